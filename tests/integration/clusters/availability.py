"""How a fixture says that this machine cannot offer what it stands for."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NoReturn, TypeVar

T = TypeVar("T")


class Unavailable(RuntimeError):
    """Something a cluster or kernel needs is missing; the text says what, and how to get it.

    `offer` turns it into a skip by name and reason, or into a failure where skips are forbidden.
    """


def require(name: str, reason: str) -> NoReturn:
    """End the test because something is missing: a skip, or a failure where `GP_TEST_REQUIRE` names it.

    Args:
        name: What is missing, such as "slurm".
        reason: Why, and what to do about it.
    """
    import pytest  # not above: benchmarks use the clusters, too

    required = {word.strip() for word in os.environ.get("GP_TEST_REQUIRE", "").split(",")}
    if required & {name, "all"}:
        pytest.fail(f"{name}: {reason} (GP_TEST_REQUIRE forbids to skip it)", pytrace=False)
    pytest.skip(f"{name}: {reason}")


def offer(name: str, make: Callable[[], T]) -> T:
    """Return what `make` makes; where it raises `Unavailable`, end the test as `require` does."""
    try:
        return make()
    except Unavailable as missing:
        reason = str(missing)
    require(name, reason)
