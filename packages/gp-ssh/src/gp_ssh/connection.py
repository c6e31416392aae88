"""Connections to hosts: one for each way to log in, whatever the number of kernels.

Methods of `Connection` block and run on worker threads; the pool lives on the runtime's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import paramiko

from gp_core import BackendError, LaunchFailed, Reason, blocking

from .hosts import Entry, Target, resolve

T = TypeVar("T")

CHANNELS = 8  # at a time; sshd allows ten of one connection (MaxSessions)
HOPS = 8  # of ProxyJump
IDLE = 600.0  # seconds without a question until a connection is closed; one that launchers call through is asked often
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
    "Check that ssh HOST logs in without a question: a key in an agent or file, which the host has in authorized_keys.",
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


def _reason_of(error: paramiko.SSHException) -> Reason:
    """Paramiko has no types for these."""
    texts = {"not found in known_hosts": HOST_KEY_UNKNOWN, "No authentication methods available": NOT_ADMITTED}
    return next((reason for text, reason in texts.items() if text in str(error)), UNREACHABLE)


@dataclass(frozen=True)
class Answer:
    """What a command on the host wrote, and its exit code (-1: a signal)."""

    code: int
    output: bytes
    errors: bytes


class Connection:
    """A connection that is open.

    Args:
        target: Where it goes.
        through: The connection that it goes through.
    """

    def __init__(self, target: Target, through: Connection | None = None) -> None:
        self.target = target
        self.through = through
        self._global = threading.Lock()  # paramiko mixes up the answers to global requests of several threads
        self._arrivals: dict[int, Callable[[paramiko.Channel], object]] = {}
        self._client = client = paramiko.SSHClient()
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        for path in target.known_hosts:
            with contextlib.suppress(OSError):
                client.load_system_host_keys(path)  # read, and never written
        try:
            self._open(client)
        except BaseException:
            client.close()
            raise

    @property
    def transport(self) -> paramiko.Transport:
        """Paramiko's object."""
        transport = self._client.get_transport()
        if transport is None or not self.is_open:
            raise ConnectionFailed(f"the connection to {self.target.name} is lost", UNREACHABLE)
        return transport

    @property
    def is_open(self) -> bool:
        """Whether it was open when something was last heard."""
        transport = self._client.get_transport()
        return transport is not None and transport.is_active()

    def _open(self, client: paramiko.SSHClient) -> None:
        target = self.target
        try:
            client.connect(
                target.host_key_name or target.hostname,
                port=target.port,
                username=target.user,
                sock=self._socket(),
                key_filename=list(target.identity_files) or None,  # type: ignore[arg-type]  # the stubs know only one
                allow_agent=not target.identities_only,
                look_for_keys=False,
                timeout=target.timeout,
                banner_timeout=target.timeout,
                auth_timeout=target.timeout,
                channel_timeout=target.timeout,
            )
        except paramiko.BadHostKeyException as error:
            offered = f"{error.key.get_name()} {error.key.fingerprint}"
            raise ConnectionFailed(
                f"{target.name} has another host key than before: {offered}", HOST_KEY_CHANGED
            ) from None
        except paramiko.AuthenticationException as error:
            text = f"{target.name} does not let {target.user} in: {error}"
            raise ConnectionFailed(text, NOT_ADMITTED) from None
        except paramiko.SSHException as error:
            raise ConnectionFailed(f"{target.name}: {error}", _reason_of(error)) from None
        except (OSError, EOFError) as error:
            text = f"{target.name} ({target.hostname} port {target.port}): {getattr(error, 'strerror', None) or error}"
            raise ConnectionFailed(text, UNREACHABLE) from None
        self.transport.set_keepalive(int(UNANSWERED / 3))

    def _socket(self) -> paramiko.Channel | paramiko.ProxyCommand | socket.socket:
        target = self.target
        if self.through is not None:
            there = (target.hostname, target.port)
            return self.through.transport.open_channel("direct-tcpip", there, ("127.0.0.1", 0), timeout=target.timeout)
        if target.proxy_command:
            return paramiko.ProxyCommand(target.proxy_command)
        made = socket.create_connection((target.hostname, target.port), target.timeout)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNANSWERED * 1000))
        return made

    def run(self, line: str, data: bytes, timeout: float) -> Answer:
        """Let ``/bin/sh`` of the host run a line.

        Args:
            line: For the shell; it is seen by nobody, because it travels on standard input.
            data: More standard input.
            timeout: Seconds.

        Raises:
            ConnectionFailed: The connection is lost, or the answer did not come in time.
        """
        deadline = time.monotonic() + timeout
        try:
            channel = self._channel(deadline)
            with contextlib.closing(channel):
                channel.settimeout(timeout)
                channel.exec_command(COMMAND)
                channel.sendall(line.encode("utf-8", "surrogateescape") + b"\n" + data)
                channel.shutdown_write()
                output = self._read(channel, deadline)
                errors = channel.makefile_stderr().read()
                if not channel.status_event.wait(max(0.01, deadline - time.monotonic())):
                    raise TimeoutError
                return Answer(channel.recv_exit_status(), output, errors)
        except (paramiko.SSHException, OSError, EOFError) as error:
            text = f"{self.target.name} did not answer within {timeout:g} s" if isinstance(error, TimeoutError) else ""
            raise ConnectionFailed(text or f"{self.target.name}: {error}", UNREACHABLE) from None

    def check(self) -> None:
        """Wait for an answer of the host's sshd, whatever it is; a host that hangs gives none, and this does not end.

        Raises:
            ConnectionFailed: The connection is lost.
        """
        with self._global:
            self.transport.global_request("keepalive@openssh.com", wait=True)
        if not self.is_open:
            raise ConnectionFailed(f"the connection to {self.target.name} is lost", UNREACHABLE)

    def forward(self, port: int, arrived: Callable[[paramiko.Channel], object]) -> int:
        """Let a port of the host's loopback listen.

        Args:
            port: Of the host; 0: any.
            arrived: Gets every connection, in paramiko's thread.

        Returns:
            The port.

        Raises:
            paramiko.SSHException: The host does not allow it, or the port is taken.
        """
        with self._global:
            port = self.transport.request_port_forward("127.0.0.1", port, self._arrived)
        self._arrivals[port] = arrived
        return port

    def _arrived(self, channel: paramiko.Channel, origin: object, server: tuple[str, int]) -> None:
        # paramiko knows one handler, whatever the number of ports
        self._arrivals.get(server[1], paramiko.Channel.close)(channel)

    def _channel(self, deadline: float) -> paramiko.Channel:
        while True:
            try:
                return self.transport.open_session(timeout=max(0.1, deadline - time.monotonic()))
            except paramiko.SSHException:  # MaxSessions of the host may be smaller than ours
                if not self.is_open or time.monotonic() > deadline - 0.1:
                    raise
                time.sleep(0.05)

    @staticmethod
    def _read(channel: paramiko.Channel, deadline: float) -> bytes:
        pieces: list[bytes] = []
        while True:
            channel.settimeout(max(0.01, deadline - time.monotonic()))
            piece = channel.recv(65536)
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)

    def close(self) -> None:
        """End it, and what goes through it."""
        self._client.close()


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
        self._targets: dict[tuple[Entry, str], Target] = {}

    async def line(self, entry: Entry, ssh_config: str = "") -> Line:
        """Return the line to a host; it may have no connection yet.

        Raises:
            ConfigError: The ssh configuration is wrong.
        """
        return await self._line(await self._target(entry, ssh_config), ssh_config)

    async def _target(self, entry: Entry, ssh_config: str) -> Target:
        key = (entry, ssh_config)
        if key not in self._targets:
            self._targets[key] = await resolve(entry, ssh_config)
        return self._targets[key]

    async def _line(self, target: Target, ssh_config: str, hops: int = 0) -> Line:
        if hops > HOPS:
            raise ConnectionFailed(f"{target.name}: its ProxyJump never ends", UNREACHABLE)
        if target not in self._lines:
            through = None
            if target.proxy_jump:
                before, _, last = target.proxy_jump.rpartition(",")
                jump = await self._target(Entry.read(last), ssh_config)
                if before:  # says more than the jump host's own configuration
                    jump = replace(jump, proxy_jump=before, proxy_command="")
                through = await self._line(jump, ssh_config, hops + 1)
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
        self._connection = connection = await blocking(Connection, self.target, through)
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

    async def run(self, line: str, data: bytes = b"", *, timeout: float = 20.0) -> Answer:
        """Let ``/bin/sh`` of the host run a line; see `Connection.run`."""
        async with self._channels:
            connection = await self.connection()
            try:
                return await blocking(connection.run, line, data, timeout)
            except ConnectionFailed:
                if connection is self._connection:  # a host that hangs keeps its connections open for ever
                    self.close()
                raise

    def close(self) -> None:
        """Close the connection; the next question makes a new one."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            threading.Thread(target=connection.close, daemon=True).start()  # it joins a thread that may hang
