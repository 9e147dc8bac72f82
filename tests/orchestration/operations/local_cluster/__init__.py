"""Tests of the local cluster, as far as they need none."""
