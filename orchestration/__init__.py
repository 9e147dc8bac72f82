"""What flows and the cluster's own jobs import: settings, the warehouse, dbt, the worker, environments."""
