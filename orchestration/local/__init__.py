"""What a laptop needs and a cluster does not: an embedded Postgres and a temporary Prefect server."""
