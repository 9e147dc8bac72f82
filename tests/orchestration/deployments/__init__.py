"""Tests of deployments as desired state."""
