"""Tests of what is done with an environment, as far as it needs no cluster."""
