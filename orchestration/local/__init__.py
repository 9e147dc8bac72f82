"""Parts for a run without a cluster: an embedded Postgres and a temporary Prefect server."""
