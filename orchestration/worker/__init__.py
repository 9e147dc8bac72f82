"""The Kubernetes worker, and the base job template that it trusts."""
