"""Tests of how runs are read and explained."""
