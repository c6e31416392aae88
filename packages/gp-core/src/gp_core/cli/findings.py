"""The two kinds of findings that the checks of ``jupyter gp doctor`` make."""

from __future__ import annotations

from ..backend import Finding


def good(subject: str, text: str) -> Finding:
    """Return what is as it should be."""
    return Finding(ok=True, subject=subject, text=text)


def bad(subject: str, text: str, advice: str) -> Finding:
    """Return what would keep kernels from starting, and what to do about it."""
    return Finding(ok=False, subject=subject, text=text, advice=advice)
