"""What authors of backends test with: the contract that defines a backend, fakes, and a detector of blocked loops.

`BackendContract` is a pytest class to inherit; it alone needs pytest (``pip install gp-core[test]``).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .contract import BackendContract
    from .fakes import FakeBackend, FakeLauncher, FakePlatform, Fault
    from .harness import Installation
    from .stalls import Stall, StallDetector

CONTRACT_VERSION = "1.0"
"""Of `BackendContract`: a second number more is a new test, a first number more changes what an old test demands."""

_HOMES = {
    "BackendContract": "contract",
    "FakeBackend": "fakes",
    "FakeLauncher": "fakes",
    "FakePlatform": "fakes",
    "Fault": "fakes",
    "Installation": "harness",
    "Stall": "stalls",
    "StallDetector": "stalls",
}

__all__ = [
    "CONTRACT_VERSION",
    "BackendContract",
    "FakeBackend",
    "FakeLauncher",
    "FakePlatform",
    "Fault",
    "Installation",
    "Stall",
    "StallDetector",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "BackendContract":
        import pytest

        pytest.register_assert_rewrite(f"{__name__}.contract")  # so that a failed assert shows its values
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
