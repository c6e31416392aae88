"""Helpers of the integration tests: an installation of gp for one test, kernels driven by clients, servers."""
