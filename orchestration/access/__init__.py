"""Access control of the Prefect API: roles, their credentials, the permissions of each route, and the audit log.

`python -m orchestration.access` starts the Prefect server with access control.
"""
