"""What only a laptop needs: an embedded Postgres and a temporary Prefect server."""
