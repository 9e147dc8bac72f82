"""Runs and their pods, brought back into agreement: no run lost, none stuck, none twice."""
