"""Tests of rendered manifests in k8s/. tests/e2e applies them to a cluster."""
