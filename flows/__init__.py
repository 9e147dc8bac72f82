"""What runs: flows, what they read and load, and the dbt project in `warehouse/`."""
