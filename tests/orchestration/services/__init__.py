"""Tests of the background services' health."""
