"""What the documentation says of failures is what people read."""

from __future__ import annotations

from pathlib import Path

import pytest

from gp_core import Reason
from gp_core.errors import REASONS
from gp_docker import reasons, swarm

PAGE = Path(__file__).parents[3] / "docs/howto/docker.md"
EVERY = [one for module in (reasons, swarm) for one in vars(module).values() if isinstance(one, Reason)]
OURS = [one for one in EVERY if one not in REASONS]


@pytest.mark.parametrize("reason", OURS, ids=lambda reason: reason.code)
def test_a_reason_is_in_the_documentation(reason: Reason) -> None:
    assert f"| `{reason.code}` | {reason.advice} |" in PAGE.read_text()
