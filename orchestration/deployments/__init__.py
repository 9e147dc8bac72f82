"""Deployments as desired state: check and sync prefect.yaml, find drift, export the live state."""
