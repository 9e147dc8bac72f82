"""The library that flows import, and the components that run flows on Kubernetes."""
