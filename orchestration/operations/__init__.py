"""An environment: the namespace of a cluster that holds server, worker and runs, and what is done with it.

`python -m orchestration.operations COMMAND` is what the Makefile's targets for Kubernetes call.
"""
