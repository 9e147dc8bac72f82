"""What executes a flow run in its pod: supervisor, engine, idempotency keys, storage of results."""
