"""Fill placeholders in a kernelspec's command, and choose which variables travel to the far side; pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from string import Template

PLACEHOLDER = re.compile(r"\{([A-Za-z0-9_]+)\}")
NEVER_SENT = frozenset({"JPY_PARENT_PID", "GP_LAUNCH_SECRETS", "PYTHONEXECUTABLE"})


def fill(argv: Iterable[str], values: Mapping[str, object]) -> list[str]:
    """Replace ``{name}`` in every argument.

    Args:
        argv: A kernelspec's command.
        values: By name; a placeholder without a value stays as it is, as in `jupyter_client`.
    """
    return [PLACEHOLDER.sub(lambda found: str(values.get(found[1], found[0])), part) for part in argv]


def placeholders(argv: Iterable[str]) -> set[str]:
    """Return the names of all placeholders in a command."""
    return {name for part in argv for name in PLACEHOLDER.findall(part)}


def names_our_launcher(argv: Sequence[str]) -> bool:
    """Whether a command in the peer's style starts our launcher, directly or through a script's arguments."""
    return any("gp_launchers" in part or "gp-launcher" in part for part in argv)


def launch_environment(
    *,
    kernelspec: Mapping[str, str],
    requested: Mapping[str, str] | None,
    process: Mapping[str, str],
    passed: Iterable[str] = (),
) -> dict[str, str]:
    """Return the variables that the far side gets: never the server's whole environment.

    Callers of jupyter_client pass ``{**os.environ, ...}`` as ``env``; what the server's own environment holds already
    is not what the caller chose, and may be the server's secret.

    Args:
        kernelspec: The kernelspec's ``env``; ``${X}`` in it is filled on the far side.
        requested: ``env`` of the start request, or None.
        process: The server's own environment.
        passed: Names of the server's variables that the operator lets through.
    """
    env = {name: process[name] for name in passed if name in process}
    for name, value in (requested if requested is not None else process).items():
        chosen = requested is not None and process.get(name) != value
        if chosen or name.startswith("KERNEL_") or name == "JPY_SESSION_NAME":
            # a literal of the caller's must not be expanded over there
            env[name] = value.replace("$", "$$")
    env |= kernelspec
    return {name: value for name, value in env.items() if name not in NEVER_SENT and _can_be_set(name, value)}


def expanded(env: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
    """Fill ``${X}`` in what `launch_environment` made, as the launcher does on the far side.

    Args:
        env: Values in which ``$$`` is a dollar.
        known: Variables of the machine that fills them in.
    """
    literal = {name: value.replace("$$", "$") for name, value in env.items() if "$" not in value.replace("$$", "")}
    values = {**known, **literal}
    return literal | {
        name: Template(value).safe_substitute(values) for name, value in env.items() if name not in literal
    }


def _can_be_set(name: str, value: str) -> bool:
    return bool(name) and "=" not in name and "\0" not in name + value
