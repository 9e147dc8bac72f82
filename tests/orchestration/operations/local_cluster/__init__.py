"""Tests of the local cluster's tools that need no cluster."""
