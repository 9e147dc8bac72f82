"""Tests of the rendered charts. tests/e2e has those on a cluster."""
