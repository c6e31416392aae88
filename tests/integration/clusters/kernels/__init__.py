"""Kernels that are not ipykernel, as kernelspec folders; see `clusters.kernels.specs`;
`clusters.kernels.peer` is gateway_provisioners."""

from clusters.kernels.peer import Peer, peer
from clusters.kernels.specs import ipykernel, irkernel, jjava, xeus_python

__all__ = ["Peer", "ipykernel", "irkernel", "jjava", "peer", "xeus_python"]
