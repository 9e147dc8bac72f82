"""Backups of the Prefect server's database, and the settlement of runs after a restore."""
