"""Tests on real parts: an embedded Postgres, a Prefect server, dbt. They mirror the tree of the code."""
