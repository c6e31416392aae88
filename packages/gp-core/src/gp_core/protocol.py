"""The messages of a launcher session (protocol 2) as the server reads and writes them; pure functions, no I/O.

Frames are in `gp_launchers.wire`, which both ends share. A launcher is believed nothing that the server knows itself:
what comes in is checked for type and size here, and against the kernel's record by the rendezvous.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gp_launchers.wire import VERSION

from .errors import (
    COMMAND_NOT_FOUND,
    KERNEL_DIED,
    NO_CONNECTION_FILE,
    NO_PORT,
    NO_SPACE,
    OUT_OF_MEMORY,
    ProtocolError,
    Reason,
)

PORTS = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")
_OF_LAUNCHERS = (COMMAND_NOT_FOUND, KERNEL_DIED, NO_CONNECTION_FILE, NO_PORT, NO_SPACE, OUT_OF_MEMORY)
_REASONS = {reason.code: reason for reason in _OF_LAUNCHERS}


def digest(secret: str) -> str:
    """Return what the server keeps of a token or secret: its SHA-256."""
    return hashlib.sha256(secret.encode()).hexdigest()


def matches(secret: str, kept: str) -> bool:
    """Compare a secret with what was kept of it, in constant time."""
    return hmac.compare_digest(digest(secret), kept)


def _text(message: Mapping[str, Any], name: str, limit: int, default: str | None = None) -> str:
    value = message.get(name, default)
    if not isinstance(value, str) or len(value) > limit:
        raise ProtocolError(f"{message.get('type')}: {name} is not a text of at most {limit} characters")
    return value


def _number(message: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = message.get(name, default)
    if type(value) is not int or abs(value) >= 2**63:
        raise ProtocolError(f"{message.get('type')}: {name} is not a whole number")
    return value


def _ports(message: Mapping[str, Any]) -> dict[str, int]:
    given = message.get("ports")
    if not isinstance(given, dict):
        raise ProtocolError(f"{message.get('type')}: ports are missing")
    ports = {name: _number(given, name) for name in PORTS}
    for name, port in ports.items():
        if not 0 < port <= 65535:
            raise ProtocolError(f"{message.get('type')}: {name} is not a port")
    return ports


@dataclass(frozen=True)
class Hello:
    """A launcher's first message."""

    kernel_id: str
    token: str
    secret: str
    launcher: str
    python: str
    host: str
    pid: int
    run: int
    capabilities: frozenset[str]
    speaks: bool  #: whether it knows our version of the protocol
    ports: dict[str, int] | None = None  #: chosen already, though the kernel may not listen yet
    relay: tuple[str, int] | None = None  #: whose streams it remembers, and how many frames of theirs it has

    def __repr__(self) -> str:  # never the token or the secret
        return f"Hello(kernel_id={self.kernel_id!r}, launcher={self.launcher!r}, host={self.host!r}, pid={self.pid})"

    @classmethod
    def read(cls, message: Mapping[str, Any]) -> Hello:
        """Check a message.

        Raises:
            ProtocolError: It is no hello.
        """
        if message.get("type") != "hello":
            raise ProtocolError("the first message is not a hello")
        versions, capabilities = message.get("versions"), message.get("capabilities", [])
        if not isinstance(versions, list) or not isinstance(capabilities, list):
            raise ProtocolError("hello: versions and capabilities are not lists")
        relay = message.get("relay")
        resumes = isinstance(relay, dict) and relay.get("id") is not None
        return cls(
            kernel_id=_text(message, "kernel_id", 200),
            token=_text(message, "token", 200),
            secret=_text(message, "secret", 200),
            launcher=_text(message, "launcher", 50, ""),
            python=_text(message, "python", 50, ""),
            host=_text(message, "host", 255, ""),
            pid=_number(message, "pid", 0),
            run=_number(message, "run", 1),
            capabilities=frozenset(item for item in capabilities[:50] if isinstance(item, str)),
            speaks=VERSION in versions,
            ports=_ports(message) if message.get("ports") is not None else None,
            relay=(_text(relay, "id", 64), _number(relay, "received")) if relay and resumes else None,
        )


@dataclass(frozen=True)
class Listening:
    """The kernel's shell, iopub and control sockets accept."""

    run: int
    pid: int
    ports: dict[str, int]

    @classmethod
    def read(cls, message: Mapping[str, Any]) -> Listening:
        """Check a message.

        Raises:
            ProtocolError: A port is missing or no port.
        """
        return cls(_number(message, "run"), _number(message, "pid", 0), _ports(message))


@dataclass(frozen=True)
class Exited:
    """The kernel's process has ended, or could not be started."""

    run: int
    code: int | None
    stderr: str
    reason: Reason
    detail: str

    @classmethod
    def read(cls, message: Mapping[str, Any]) -> Exited:
        """Check a message.

        Raises:
            ProtocolError: Wrong types or sizes.
        """
        code = None if message.get("code") is None else _number(message, "code")
        reason = _text(message, "reason", 50, "") if message.get("reason") else ""
        return cls(
            run=_number(message, "run"),
            code=code,
            stderr=_text(message, "stderr", 64 * 1024, ""),
            reason=_REASONS.get(reason, KERNEL_DIED),
            detail=_text(message, "detail", 2000, "") if message.get("detail") else "",
        )


@dataclass(frozen=True)
class Dropped:
    """Output that nobody took in time, since the launcher began."""

    messages: int
    size: int

    @classmethod
    def read(cls, message: Mapping[str, Any]) -> Dropped:
        """Check a message.

        Raises:
            ProtocolError: No numbers.
        """
        return cls(_number(message, "messages"), _number(message, "bytes"))


Message = dict[str, Any]


def accepted(*, orphan_timeout: float, linger: float, ping: float, relay: Message | None = None) -> Message:
    """The launcher is who it says; times in seconds."""
    times = {"orphan_timeout": orphan_timeout, "linger": linger, "ping": ping}
    return {"type": "accepted", "version": VERSION, **times, "relay": relay}


def refused(reason: str, text: str, *, final: bool) -> Message:
    """The launcher is not served here; if final it ends its kernel and itself."""
    return {"type": "refused", "reason": reason, "text": text, "final": final}


def signal(signum: int) -> Message:
    """Send a signal to the kernel's process group."""
    return {"type": "signal", "signum": signum}


def shutdown(grace: float) -> Message:
    """End kernel and launcher; the kernel is killed after ``grace`` seconds."""
    return {"type": "shutdown", "grace": grace}


def restart(run: int, *, env: Mapping[str, str], argv: Sequence[str] | None, cwd: str | None) -> Message:
    """Start the kernel anew inside its launcher; ``argv`` None: as before."""
    return {"type": "restart", "run": run, "env": dict(env), "argv": list(argv) if argv else None, "cwd": cwd}


def pong(message: Mapping[str, Any]) -> Message:
    """Answer a ping."""
    return {"type": "pong", "n": message.get("n") if isinstance(message.get("n"), int) else 0}
