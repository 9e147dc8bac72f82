"""Tests of deploying and operating an environment."""
