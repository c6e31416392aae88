"""What a connection to a host is, and the reasons for which there is none."""

from __future__ import annotations

import subprocess
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import paramiko

from gp_core import BackendError, LaunchFailed, Reason

from .hosts import Target

UNANSWERED = 15.0  # seconds until data that nobody acknowledges, or a silent host, breaks a connection
LINE = 'IFS= read -r line && eval "$line"'  # no word of it means anything else to fish or csh between single quotes
COMMAND = f"exec /bin/sh -c '{LINE}'"
"""What is run on every host: whatever the login shell is, a plain one takes over and reads what to do."""

UNREACHABLE = Reason("HostUnreachable", "Check name, network and that sshd runs there: ssh HOST must work by hand.")
HOST_KEY_UNKNOWN = Reason(
    "HostKeyUnknown", "Log in once by hand (ssh HOST) and compare the fingerprint, so that known_hosts has its key."
)
HOST_KEY_CHANGED = Reason(
    "HostKeyChanged",
    "Somebody may be in between. If the host was set up anew, remove its old key (ssh-keygen -R HOST) and log in once.",
)
NOT_ADMITTED = Reason(
    "AuthenticationFailed",
    "Check that ssh HOST logs in without a question: a key in an agent or file, which the host has in authorized_keys. "
    "What only your own ssh can do (Kerberos, security keys, a connection that you opened) it does with connector=ssh.",
)


class ConnectionFailed(BackendError):
    """A host cannot be reached or does not let us in; holds a typed reason.

    Args:
        text: What happened.
        reason: Typed.
        of_host: It concerns all kernels on the host.
    """

    def __init__(self, text: str, reason: Reason, *, of_host: bool = True) -> None:
        super().__init__(f"{text} [{reason.code}]\n{reason.advice}")
        self.of_host = of_host
        self.text = text
        self.reason = reason

    def as_failure(self, kernel_id: str) -> LaunchFailed:
        """Return the failure of a start."""
        return LaunchFailed(f"kernel {kernel_id}: {self.text}", reason=self.reason)


class Unanswered(ConnectionFailed):
    """An answer did not come in time; the connection may be as good as ever.

    Args:
        name: Of the host.
        timeout: Seconds.
    """

    def __init__(self, name: str, timeout: float) -> None:
        super().__init__(f"{name} did not answer within {timeout:g} s", UNREACHABLE)


@dataclass(frozen=True)
class Answer:
    """What a command on the host wrote, and its exit code (-1: a signal)."""

    code: int
    output: bytes
    errors: bytes


class Listener(Protocol):
    """Our end of connections that come to a port of the host.

    Attributes:
        address: ``host`` and ``port`` of this machine.
    """

    address: tuple[str, int]

    def add(self, channel: paramiko.Channel) -> None:
        """Bring one there."""


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End a process that holds a connection, and leave no zombie; blocks."""
    process.terminate()
    try:
        process.wait(2.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Connection(ABC):
    """A connection that is open; methods block, for worker threads.

    Attributes:
        target: Where it goes.
    """

    target: Target

    @property
    @abstractmethod
    def is_open(self) -> bool:
        """Whether it was open when something was last heard; does not block."""

    @abstractmethod
    def run(self, line: str, data: bytes, timeout: float) -> Answer:
        """Let ``/bin/sh`` of the host run a line.

        Args:
            line: For the shell; it is seen by nobody, because it travels on standard input.
            data: More standard input.
            timeout: Seconds.

        Raises:
            ConnectionFailed: The connection is lost.
            Unanswered: The answer did not come in time.
        """

    @abstractmethod
    def check(self) -> None:
        """Wait for an answer of the host, whatever it is; of one that hangs none may ever come.

        Raises:
            ConnectionFailed: The connection is lost.
        """

    @abstractmethod
    def forward(self, port: int, listener: Listener) -> int:
        """Let a port of the host's loopback listen.

        Args:
            port: Of the host; 0: any.
            listener: Where its connections end.

        Returns:
            The port.

        Raises:
            BackendError: The host does not allow it, or the port is taken.
        """

    @abstractmethod
    def cancel(self, port: int) -> None:
        """Let a forwarded port go, if that can be done; otherwise it goes with the connection.

        Args:
            port: Of the host.
        """

    @abstractmethod
    def close(self) -> None:
        """End it, and what goes through it."""
