"""Tests of the image, and of Prefect on one machine with Docker."""
