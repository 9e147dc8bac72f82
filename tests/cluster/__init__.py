"""A real Kubernetes for development and tests: a context that is named, kind, or a node from packages."""
