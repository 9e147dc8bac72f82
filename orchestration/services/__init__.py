"""The Prefect server's background services, with a health that shows whether each of them makes progress."""
