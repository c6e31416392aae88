"""Make kernelspecs: the stanza added to a copy of an existing one, or a plugin's template filled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ._markers import hookimpl


@dataclass(frozen=True, kw_only=True)
class SpecTemplate:
    """A kernelspec that a plugin offers for ``jupyter gp install BACKEND --template NAME``.

    Args:
        name: Of the template.
        provisioner: Entry point that it is for.
        spec: The kernel.json.
        description: One line for people.
    """

    name: str
    provisioner: str
    spec: Mapping[str, Any] = field(repr=False)
    description: str = ""


@hookimpl
def gp_spec_templates() -> list[SpecTemplate]:
    """Offer a Python kernel of this machine."""
    return [
        SpecTemplate(
            name="python",
            provisioner="gp-local-provisioner",
            description="Python on this machine, through the whole protocol",
            spec={
                "argv": ["python3", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                "display_name": "Python 3 (gp)",
                "language": "python",
            },
        )
    ]
