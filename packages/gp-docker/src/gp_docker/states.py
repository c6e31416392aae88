"""What the states of a container mean for its kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gp_core import Reason, State, Status
from gp_core.errors import COMMAND_NOT_FOUND, OUT_OF_MEMORY

from .reasons import CONTAINER_ENDED, EXEC_FORMAT

STATES = {
    "created": State.PENDING,
    "restarting": State.PENDING,
    "running": State.RUNNING,
    "paused": State.RUNNING,
    "removing": State.GONE,
    "exited": State.GONE,
    "dead": State.GONE,
}
"""By the engine's word."""

CODES: dict[int, tuple[Reason, str]] = {
    126: (COMMAND_NOT_FOUND, "its command cannot be run (exit code 126)"),
    127: (COMMAND_NOT_FOUND, "its command was not found (exit code 127)"),
}


def gone(code: int | None, *, out_of_memory: bool = False, said: str = "") -> Status:
    """Return the status of a container that has ended.

    Args:
        code: Its exit code, if it is known.
        out_of_memory: The engine saw that its memory was used up.
        said: By the engine.
    """
    reason, detail = CODES.get(code or 0, (CONTAINER_ENDED, f"its container has ended ({_text(code)})"))
    if out_of_memory:
        reason, detail = OUT_OF_MEMORY, f"its container used up its memory ({_text(code)})"
    if "exec format error" in said:
        reason, detail = EXEC_FORMAT, said
    # as other backends say it: a number above 128 means a signal
    number = None if code is None else 128 - code if 128 < code < 160 else code
    return Status(state=State.GONE, exit_code=number, reason=reason, detail=detail)


def _text(code: int | None) -> str:
    return "exit code unknown" if code is None else f"exit code {code}"


def status_of(told: Mapping[str, Any]) -> Status:
    """Return the status that an inspected container is in."""
    said = told["State"]
    state = STATES.get(said["Status"], State.UNKNOWN)
    if state is State.GONE:
        return gone(said.get("ExitCode"), out_of_memory=bool(said.get("OOMKilled")), said=said.get("Error") or "")
    return Status(state=state, host=address_of(told), detail="paused" if said["Status"] == "paused" else "")


def address_of(told: Mapping[str, Any]) -> str | None:
    """Return the address of an inspected container, in the first of its networks that gives it one."""
    networks = (told.get("NetworkSettings") or {}).get("Networks") or {}
    if "host" in networks:
        return "127.0.0.1"
    return next((one["IPAddress"] for one in networks.values() if one.get("IPAddress")), None)
