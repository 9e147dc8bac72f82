"""Deployments as desired state: prefect.yaml and what lies beside it are brought to the server, and back."""
