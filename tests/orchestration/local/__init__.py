"""Tests of what only a laptop needs."""
