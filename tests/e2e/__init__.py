"""Tests of whole releases on a real cluster."""
