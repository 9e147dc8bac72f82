"""Tests of the local cluster, and the namespace and API server that tests use."""
