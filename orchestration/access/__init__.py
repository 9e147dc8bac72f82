"""Who may call which route of the Prefect API: roles, their credentials, and the audit log.

`python -m orchestration.access` starts the Prefect server with access control.
"""
