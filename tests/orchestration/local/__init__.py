"""Tests of the parts for a run without a cluster."""
