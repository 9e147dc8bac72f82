"""Check an environment before and after its install: cluster, releases, Prefect server, database.

Each check returns a finding: ok, or a warning or failure with its cure. `findings` has the registry and runs the checks
concurrently; the `*_checks` modules hold the checks. The image does not contain this package.
"""
