"""A real Slurm for the tests; see `clusters.slurm.cluster`."""

from clusters.slurm.cluster import SlurmCluster

__all__ = ["SlurmCluster"]
