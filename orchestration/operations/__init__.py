"""Operate an environment: the namespace of a cluster that holds a Prefect server, its workers and its runs.

The Makefile's targets for Kubernetes call `python -m orchestration.operations COMMAND`. The image does not contain this
package.
"""
