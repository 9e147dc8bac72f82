"""Tests of orchestration.dbt."""
