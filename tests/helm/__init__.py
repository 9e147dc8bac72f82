"""Tests of the charts as they render; what they do on a cluster is in tests/e2e."""
