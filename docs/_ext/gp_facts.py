"""What the code says of itself, as Markdown: options, failure reasons, help texts, values.

Needs no Sphinx, so that the tests of gp-core can ask the same functions.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from traitlets import HasTraits, TraitType, Undefined

from gp_core.errors import REASONS
from gp_core.options import POLICY, WITHOUT_EFFECT, ProvisionerOptions
from gp_core.plugins import plugins
from gp_core.server import KernelServer

EXCEPT = {"operator": "; never in kernel.json"}
NEVER_NARROWED = ("client_parameters", "env_passthrough")  # policy that a kernelspec must not touch at all


@dataclass(frozen=True)
class Option:
    """One option as the reference shows it.

    Args:
        name: Key of kernel.json and name of the trait.
        owner: Class to name in a configuration file.
        kind: process, policy, operator (policy that no kernelspec may touch) or launch.
        type: Of its value.
        default: As Python writes it.
        variable: Of the environment, if there is one.
        help: What it does.
    """

    name: str
    owner: str
    kind: str
    type: str
    default: str
    variable: str | None
    help: str

    def markdown(self) -> str:
        places = f"`c.{self.owner}.{self.name}`" + (f" or `{self.variable}`" if self.variable else "")
        lines = [
            f"```{{confval}} {self.name}",
            self.help,
            "",
            f"{self.type.capitalize()}; default `{self.default}`. Set {places}{EXCEPT.get(self.kind, '')}.",
            "```",
        ]
        return "\n".join(lines)


def options(group: str) -> list[Option]:
    """Return the options of a group: process, policy, launch, or the name of an installed backend."""
    if group == "process":
        return [_option(KernelServer, name, "process") for name in KernelServer.class_own_traits(config=True)]
    common = ProvisionerOptions.class_own_traits(config=True)
    if group == "policy":
        return [
            _option(ProvisionerOptions, name, "operator" if name in NEVER_NARROWED else "policy")
            for name in common
            if name in POLICY
        ]
    if group == "launch":
        return [_option(ProvisionerOptions, name, "launch") for name in common if name not in POLICY]
    backend = plugins().backends[group]
    return [_option(backend, name, "launch") for name in backend.class_own_traits(config=True)]


def groups() -> list[str]:
    """Return the names of all groups of options."""
    return ["process", "policy", "launch", *sorted(plugins().backends)]


def _option(cls: type[HasTraits], name: str, kind: str) -> Option:
    trait: TraitType[Any, Any] = cls.class_traits(config=True)[name]
    return Option(
        name=name,
        owner=cls.__name__,
        kind=kind,
        type=_type(trait),
        default=_default(trait),
        variable=trait.metadata.get("env"),
        help=(trait.help or "").strip(),
    )


TYPES = {"Unicode": "text", "Int": "whole number", "Float": "number", "Bool": "true or false", "List": "list of texts"}


def _type(trait: TraitType[Any, Any]) -> str:
    values = getattr(trait, "values", None)
    if values:
        return "one of " + ", ".join(map(str, values))
    shown = TYPES.get(type(trait).__name__, "mapping")
    return f"{shown} or nothing" if trait.allow_none else shown


def _default(trait: TraitType[Any, Any]) -> str:
    saved = {name: os.environ.pop(name) for name in [trait.metadata.get("env")] if name and name in os.environ}
    try:
        value = trait.default()
    finally:
        os.environ.update(saved)
    return repr(None if value is Undefined else value)


def options_markdown(group: str) -> str:
    """Return the reference of a group of options."""
    made = "\n\n".join(option.markdown() for option in options(group))
    return made or f"The `{group}` backend has no options of its own."


def without_effect_markdown() -> str:
    """Return the table of option names that are accepted and do nothing."""
    rows = [f"| `{name}` | {why} |" for name, why in WITHOUT_EFFECT.items()]
    return "\n".join(["| name | why it is not needed |", "|---|---|", *rows])


def reasons_markdown() -> str:
    """Return the table of the core's failure reasons."""
    rows = [
        f"| [`{reason.code}`](../howto/troubleshooting.md#{reason.code.lower()}) | {reason.advice} |"
        for reason in REASONS
    ]
    return "\n".join(["| code | advice in the message |", "|---|---|", *rows])


def commands() -> list[str]:
    """Return the names of the subcommands of ``jupyter gp``."""
    from gp_core.cli import JupyterGP

    return list(JupyterGP.subcommands)


def command_help(command: str) -> str:
    """Return what ``jupyter gp COMMAND --help`` prints; without a command, ``jupyter gp --help``."""
    from gp_core.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main([*command.split(), "--help"])
    return out.getvalue().rstrip()


def launcher_help() -> str:
    """Return what the launcher prints for ``--help``."""
    from gp_launchers.options import HELP

    return HELP.rstrip()


def value(path: str) -> str:
    """Return a constant of the code, such as ``gp_core.rendezvous.PING``, as people write it."""
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        return str(found)
    if isinstance(found, int) and found >= 1024 and found % 1024 == 0:
        return f"{found // 1024 // 1024} MiB" if found % (1024 * 1024) == 0 else f"{found // 1024} KiB"
    return f"{found:,}" if isinstance(found, int) else f"{found:g}"


def contract_tests() -> Iterator[tuple[str, str]]:
    """Yield name and purpose of every test of the contract."""
    from gp_core.testing import BackendContract

    for name, function in vars(BackendContract).items():
        if name.startswith("test_") and callable(function):
            yield name, " ".join((function.__doc__ or "").split())


def contract_markdown() -> str:
    """Return the list of all tests of the contract."""
    return "\n".join(f"`{name}`\n: {text}\n" for name, text in contract_tests())
