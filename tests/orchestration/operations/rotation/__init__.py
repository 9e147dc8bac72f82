"""Rotations of Secrets: the Kubernetes parts on a real API server, what checks a password on real servers."""
