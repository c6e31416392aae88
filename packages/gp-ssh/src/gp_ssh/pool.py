"""The connections of this process: one for each way to log in, whatever the number of kernels."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Generic, TypeVar

from gp_core import BackendError, blocking
from gp_core.runtime import runtime

from .by_paramiko import ParamikoConnection
from .by_ssh import SshConnection
from .connection import UNANSWERED, UNREACHABLE, Answer, Connection, ConnectionFailed, Unanswered
from .hosts import Client, Entry, Target, resolve

T = TypeVar("T")

CHANNELS = 8  # at a time; sshd allows ten of one connection (MaxSessions)
HOPS = 8  # of ProxyJump
IDLE = 600.0  # seconds without a question until a connection is closed; one that launchers call through is asked often


def connect(target: Target, through: Connection | None) -> Connection:
    """Open a connection; blocks.

    Args:
        target: Where it goes.
        through: The connection that it goes through.

    Raises:
        ConnectionFailed: There is none to be had.
    """
    if target.by_ssh:
        return SshConnection(target)
    assert through is None or isinstance(through, ParamikoConnection)
    return ParamikoConnection(target, through)


class Shared(Generic[T]):
    """Something that takes time, and that all who want it meanwhile do once: a hundred starts on a host that is dark.

    Args:
        make: Does it.
    """

    def __init__(self, make: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._make = make
        self._task: asyncio.Task[T] | None = None

    async def __call__(self) -> T:
        """Return what it comes to; a caller that is cancelled disturbs no other."""
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._make())
            self._task.add_done_callback(lambda task: task.cancelled() or task.exception())  # retrieved
        return await asyncio.shield(self._task)


class Pool:
    """The connections of this process, made when they are needed; for the runtime's loop."""

    def __init__(self) -> None:
        self._lines: dict[Target, Line] = {}
        self._targets: dict[tuple[Entry, Client], Target] = {}

    async def line(self, entry: Entry, client: Client) -> Line:
        """Return the line to a host; it may have no connection yet.

        Raises:
            ConfigError: The ssh configuration is wrong.
        """
        return await self._line(await self._target(entry, client), client)

    async def _target(self, entry: Entry, client: Client) -> Target:
        key = (entry, client)
        if key not in self._targets:
            self._targets[key] = await resolve(entry, client)
        return self._targets[key]

    async def _line(self, target: Target, client: Client, hops: int = 0) -> Line:
        if hops > HOPS:
            raise ConnectionFailed(f"{target.name}: its ProxyJump never ends", UNREACHABLE)
        if target not in self._lines:
            through = None
            if target.proxy_jump and not target.by_ssh:  # which goes there by itself
                before, _, last = target.proxy_jump.rpartition(",")
                jump = await self._target(Entry.read(last), client)
                if before:  # says more than the jump host's own configuration
                    jump = replace(jump, proxy_jump=before, proxy_command="")
                through = await self._line(jump, client, hops + 1)
            self._lines.setdefault(target, Line(target, through))
        return self._lines[target]


class Line:
    """The way to one host: a connection when there is need of one, and so many questions at a time as it bears.

    Args:
        target: Where it goes.
        through: The way to the host that it goes through.
    """

    def __init__(self, target: Target, through: Line | None = None) -> None:
        self.target = target
        self._through = through
        self._connection: Connection | None = None
        self._connecting = Shared(self._connect)
        self._doubt = Shared(self._look_at)
        self._channels = asyncio.Semaphore(CHANNELS)
        self._used = 0.0

    async def connection(self) -> Connection:
        """Return the open connection; whoever comes while it is made waits for that one.

        Raises:
            ConnectionFailed: There is none to be had.
        """
        self.touch()
        if self._connection is not None and self._connection.is_open:
            return self._connection
        return await self._connecting()

    def touch(self) -> None:
        """Note that it is used, and what it goes through."""
        self._used = time.monotonic()
        if self._through is not None:
            self._through.touch()

    def _retire(self, connection: Connection) -> None:
        if connection is not self._connection:
            return
        rest = self._used + IDLE - time.monotonic()
        if rest > 0:
            asyncio.get_running_loop().call_later(rest, self._retire, connection)
        else:
            self.close()

    async def _connect(self) -> Connection:
        self.close()
        through = await self._through.connection() if self._through is not None else None
        self._connection = connection = await blocking(connect, self.target, through)
        asyncio.get_running_loop().call_later(IDLE, self._retire, connection)
        return connection

    async def checked(self) -> Connection:
        """Return a connection that has answered just now.

        Raises:
            ConnectionFailed: There is none to be had.
        """
        connection = await self.connection()
        try:
            await asyncio.wait_for(blocking(connection.check), UNANSWERED)
        except (asyncio.TimeoutError, ConnectionFailed):
            if connection is self._connection:
                self.close()
            raise ConnectionFailed(f"{self.target.name} does not answer", UNREACHABLE) from None
        return connection

    async def _look_at(self) -> None:
        with contextlib.suppress(BackendError):  # it is closed then
            await self.checked()

    async def run(self, line: str, data: bytes = b"", *, timeout: float = 20.0) -> Answer:
        """Let ``/bin/sh`` of the host run a line; see `Connection.run`."""
        async with self._channels:
            connection = await self.connection()
            try:
                return await blocking(connection.run, line, data, timeout)
            except Unanswered:  # by one user's home perhaps, or by a host that hangs, whose connections stay open
                runtime().spawn(self._doubt(), name=f"look at the connection to {self.target.name}")
                raise
            except ConnectionFailed:
                if connection is self._connection:
                    self.close()
                raise

    def close(self) -> None:
        """Close the connection; the next question makes a new one."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            threading.Thread(target=connection.close, daemon=True).start()  # it joins a thread that may hang
