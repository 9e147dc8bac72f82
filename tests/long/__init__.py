"""Long tests: minutes to half an hour each. `make test-long` runs them and records what they found."""
