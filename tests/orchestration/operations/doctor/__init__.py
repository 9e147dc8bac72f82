"""Tests of orchestration.operations.doctor."""
