"""Read and explain runs: timeline, diagnosis, memory."""
