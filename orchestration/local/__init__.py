"""Parts for one machine without a cluster: embedded Postgres, temporary Prefect server, secrets of the Docker stack."""
