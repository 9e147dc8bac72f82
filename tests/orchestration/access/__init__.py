"""Tests of access control for the Prefect API."""
