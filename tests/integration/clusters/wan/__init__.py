"""A long line to a far network, on one machine; see `clusters.wan.link`."""

from clusters.wan.link import Link

__all__ = ["Link"]
