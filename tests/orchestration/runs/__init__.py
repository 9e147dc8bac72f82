"""Tests of what executes a flow run in its pod."""
