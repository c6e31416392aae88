"""Kernels that are not ipykernel, as kernelspec folders; see `clusters.kernels.specs`."""

from clusters.kernels.specs import ipykernel, irkernel, jjava, xeus_python

__all__ = ["ipykernel", "irkernel", "jjava", "xeus_python"]
