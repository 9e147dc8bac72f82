"""Create and delete a Kubernetes cluster on this machine, for development and tests."""
