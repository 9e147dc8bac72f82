"""Tests of the image and of what runs it on one machine with Docker."""
