"""Faults of runs, their pods, workers and servers, on a real cluster."""
