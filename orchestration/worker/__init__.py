"""The Kubernetes worker and its trusted base job template."""
