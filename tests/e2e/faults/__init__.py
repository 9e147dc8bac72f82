"""Fault tests on a real cluster: faults of runs, pods, workers, nodes and servers."""
