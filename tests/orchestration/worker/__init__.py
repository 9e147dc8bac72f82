"""Tests of the Kubernetes worker and its base job template."""
