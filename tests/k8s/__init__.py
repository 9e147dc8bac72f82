"""Tests of what kubectl applies, as it renders; what it does on a cluster is in tests/e2e."""
