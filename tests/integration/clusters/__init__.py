"""Real clusters and real kernels for the integration tests, each brought up from packages alone."""
