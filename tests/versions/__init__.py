"""Run the contract tests on other versions of Prefect than the locked one, for `make test-versions`."""
