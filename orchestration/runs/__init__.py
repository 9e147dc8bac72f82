"""The execution of a flow run in its pod: supervisor, engine, idempotency keys and storage of results."""
