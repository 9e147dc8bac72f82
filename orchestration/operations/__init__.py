"""Operate an environment: the namespaces of a cluster that hold a Prefect server, its workers and its runs.

The Makefile's targets for Kubernetes call `python -m orchestration.operations COMMAND`. The image does not contain this
package.
"""
