"""The TLS server that launchers dial; one session per kernel.

TLS runs over memory buffers in a plain asyncio protocol: asyncio's own TLS transport keeps about 280 KiB for every
connection. Until a launcher is accepted it is a stranger: it gets a deadline, small frames, and when too many strangers
are connected the oldest one goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import resource
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable
from typing import Protocol

from gp_launchers.tls import RECORD, decrypt, room
from gp_launchers.wire import (
    MAX_FRAME,
    MAX_HELLO,
    MESSAGE,
    NOT_SENT,
    TCP_NOTSENT_LOWAT,
    Decoder,
    WireError,
    pack_message,
    unpack_message,
)

from . import protocol
from .errors import ConfigError, GPError, ProtocolError
from .protocol import Hello, Message
from .runtime import stop_listening

log = logging.getLogger(__name__)

HELLO_DEADLINE = 10.0  # seconds for handshake and hello together
PING = 30.0  # seconds of silence after which a launcher pings
SILENT_PINGS = 2.5  # pings that may be missing until a session is taken for broken
SWEEP = 2.5  # seconds between two looks for such sessions
MAX_UNSENT = 4 * MAX_FRAME  # bytes that a launcher may leave unread
CLOSING = 5.0  # seconds for a launcher to take the last words of a session
TLS_HANDSHAKE = 0x16  # first byte of every TLS connection


class Kernel(Protocol):
    """A kernel as the rendezvous knows it."""

    def connected(self, session: Session, hello: Hello) -> Message:
        """A launcher proved to be this kernel's; returns the answer, after which messages flow."""

    def received(self, session: Session, message: Message) -> None:
        """A message came from the launcher.

        Raises:
            ProtocolError: It is not to be believed; the session is closed.
        """

    def relayed(self, session: Session, kind: int, stream: int, payload: bytes) -> None:
        """A frame of the kernel's channels came.

        Raises:
            WireError: The launcher breaks the rules; the session is closed.
        """

    def writable(self, session: Session) -> None:
        """What was queued in the session has been sent, or all that has come was received."""

    def disconnected(self, session: Session) -> None:
        """The session broke; says nothing about the kernel."""


Doorkeeper = Callable[[Hello], Awaitable["Kernel | Message"]]
"""Decides about a hello: the kernel it belongs to, or the refusal to send."""


class Session(asyncio.Protocol):
    """One TLS connection of a launcher, from its first byte to its last."""

    __slots__ = (
        "_buffer_in",
        "_buffer_out",
        "_decoder",
        "_handshaken",
        "_introduced",
        "_rendezvous",
        "_tls",
        "heard",
        "kernel",
        "ping",
        "transport",
    )

    def __init__(self, rendezvous: Rendezvous) -> None:
        self._rendezvous = rendezvous
        self._tls: ssl.SSLObject | None = None
        self._handshaken = self._introduced = False
        self._decoder = Decoder(MAX_HELLO)
        self.transport: asyncio.Transport | None = None
        self.kernel: Kernel | None = None  #: None while it is a stranger
        self.heard = 0.0
        self.ping = PING  #: seconds of silence after which its launcher pings

    @property
    def unsent(self) -> int:
        """Bytes that wait to be sent."""
        return self.transport.get_write_buffer_size() if self.transport is not None else 0

    @property
    def address(self) -> str:
        """Where the launcher calls from."""
        peer = self.transport.get_extra_info("peername") if self.transport else None
        return str(peer[0]) if peer else "?"

    def send(self, message: Message) -> None:
        """Send a message; a closed session takes it silently, because its loss is told otherwise."""
        self.send_frames(pack_message(message))

    def send_frames(self, frames: bytes) -> None:
        """Send whole frames, likewise."""
        if self._tls is None or self.transport is None or self.transport.is_closing():
            return
        self._tls.write(frames)
        self._flush()

    def accept(self, kernel: Kernel, hello: Hello) -> None:
        """Make a stranger the session of a kernel."""
        self.kernel = kernel
        self._decoder.limit = MAX_FRAME
        self.send(kernel.connected(self, hello))

    def close(self, why: str = "") -> None:
        """End the session."""
        if self.transport is not None and not self.transport.is_closing():
            if why:
                log.info("launcher session of %s closed: %s", self.address, why)
            self._flush()
            self.transport.close()
            if self.transport.get_write_buffer_size():  # else one that reads nothing would keep it for ever
                self._rendezvous.loop.call_later(CLOSING, self.transport.abort)

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        with contextlib.suppress(OSError):
            made = transport.get_extra_info("socket")
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if sys.platform == "linux":
                made.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, NOT_SENT)
        self._rendezvous.stranger_came(self)

    def data_received(self, data: bytes) -> None:
        try:
            if self._tls is None and not self._first_bytes(data):
                return
            self._buffer_in.write(data)
            self._read()
        except (WireError, ProtocolError, ssl.SSLError) as error:
            self.close(f"{type(error).__name__}: {error}")

    def eof_received(self) -> bool:
        return False  # a launcher that half closes is gone

    def resume_writing(self) -> None:
        if self.kernel is not None:
            self.kernel.writable(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._rendezvous.session_ended(self)
        if self.kernel is not None:
            self.kernel.disconnected(self)
        self.kernel = self._tls = None

    # -- TLS over memory buffers

    def _first_bytes(self, data: bytes) -> bool:
        if data[0] != TLS_HANDSHAKE:
            assert self.transport is not None
            if not self._rendezvous.hand_over(self.transport, data):
                self.close("not TLS")
            self._rendezvous.session_ended(self)
            return False
        self._buffer_in, self._buffer_out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = self._rendezvous.context.wrap_bio(self._buffer_in, self._buffer_out, server_side=True)
        return True

    def _read(self) -> None:
        assert self._tls is not None
        try:
            if not self._handshaken:
                self._tls.do_handshake()
                self._handshaken = True
            self._decrypt(self._tls, self._rendezvous.room)
        except ssl.SSLWantReadError:
            pass
        finally:
            self._flush()

    def _decrypt(self, tls: ssl.SSLObject, buffer: memoryview) -> None:
        size = len(buffer)
        while len(buffer) - size < RECORD:  # it was full: there may be more
            size, ended = decrypt(tls, buffer)
            self._frames(buffer[:size])
            if self.kernel is not None:
                self.kernel.writable(self)
            if ended:
                self.close()

    def _flush(self) -> None:
        if self._tls is None or self.transport is None:
            return
        if data := self._buffer_out.read():
            self.transport.write(data)
        if self.transport.get_write_buffer_size() > MAX_UNSENT:
            log.warning("launcher of %s does not read: session aborted", self.address)
            self.transport.abort()

    def _frames(self, data: bytes | memoryview) -> None:
        self.heard = self._rendezvous.loop.time()
        for kind, stream, payload in self._decoder.feed(data):
            if kind == MESSAGE and stream == 0:
                self._message(unpack_message(payload))
            elif kind != MESSAGE and self.kernel is not None:
                self.kernel.relayed(self, kind, stream, payload)

    def _message(self, message: Message) -> None:
        if self.kernel is None:
            if not self._introduced:  # whatever else it sends before the answer is dropped
                self._introduced = True
                self._rendezvous.introduce(self, Hello.read(message))
        elif message["type"] == "ping":
            self.send(protocol.pong(message))
        else:
            self.kernel.received(self, message)


class Rendezvous:
    """The listener of this process.

    Args:
        context: TLS context of the server's identity.
        doorkeeper: Decides about every hello.
        hand_over: Takes a connection that does not speak TLS, or returns False (protocol 1, if it is allowed).
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        doorkeeper: Doorkeeper,
        hand_over: Callable[[asyncio.Transport, bytes], bool] = lambda transport, data: False,
    ) -> None:
        self.context = context
        self.hand_over = hand_over
        self.loop = asyncio.get_running_loop()
        self.room = room()  # for all sessions: none keeps anything there
        self.sessions: set[Session] = set()
        self._doorkeeper = doorkeeper
        self._strangers: dict[Session, asyncio.TimerHandle] = {}  # in the order in which they came
        self._answers: set[asyncio.Task[None]] = set()
        self._max_strangers = _raise_file_limit() // 4
        self._servers: list[asyncio.Server] = []
        self._ports: set[int] = set()
        self._is_open = True

    async def listen(self, hosts: list[str], port: int, retries: int) -> int:
        """Open the listener and return its port.

        Args:
            hosts: Addresses to bind.
            port: First port to try; 0 for any.
            retries: How many of the following ports to try when it is taken.

        Raises:
            ConfigError: None of the ports can be bound.
        """
        problem: OSError | None = None
        for candidate in range(port, port + (retries if port else 0) + 1):
            try:
                bound = await self._bound(hosts, candidate)
            except OSError as error:
                problem = error
                continue
            self.loop.call_later(SWEEP, self._sweep)
            return bound
        raise ConfigError(
            f"no launcher can call back: ports {port} to {port + retries} on {', '.join(hosts)} cannot be bound "
            f"({problem}); set GP_RESPONSE_PORT to a free port or to 0"
        )

    async def listen_also(self, hosts: list[str], port: int) -> None:
        """Open one more port, for launchers that were told another one; one that is open already is fine.

        Args:
            hosts: Addresses to bind.
            port: To open.

        Raises:
            OSError: It cannot be bound.
        """
        if port not in self._ports:
            await self._bound(hosts, port)

    async def _bound(self, hosts: list[str], port: int) -> int:
        made: list[asyncio.Server] = []
        try:
            for host in hosts:  # one by one: with port 0 each would get another port
                server = await self.loop.create_server(
                    lambda: Session(self), host, port, backlog=1024, start_serving=False
                )
                made.append(server)
                await server.start_serving()
                port = port or int(made[0].sockets[0].getsockname()[1])
        except BaseException:
            for server in made:
                stop_listening(server)
            raise
        self._servers += made
        self._ports.add(port)
        return port

    def close(self) -> None:
        """Close the listener and all sessions."""
        self._is_open = False
        self._ports.clear()
        while self._servers:
            stop_listening(self._servers.pop())
        for session in [*self._strangers, *self.sessions]:
            session.close()

    # -- called by sessions

    def stranger_came(self, session: Session) -> None:
        if not self._is_open:  # the listener was closed while it came
            session.close()
            return
        self._strangers[session] = self.loop.call_later(HELLO_DEADLINE, session.close, "no hello in time")
        if len(self._strangers) > self._max_strangers:
            oldest = next(iter(self._strangers))
            assert oldest.transport is not None
            self.session_ended(oldest)  # at once: more of them may come before the transport has told of its end
            oldest.transport.abort()

    def session_ended(self, session: Session) -> None:
        self.sessions.discard(session)
        if timer := self._strangers.pop(session, None):
            timer.cancel()

    def introduce(self, session: Session, hello: Hello) -> None:
        answer = self.loop.create_task(self._answer(session, hello))
        self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)

    async def _answer(self, session: Session, hello: Hello) -> None:
        if not hello.speaks:
            found: Kernel | Message = protocol.refused("version", "this server speaks protocol 2 only", final=True)
        else:
            try:
                found = await self._doorkeeper(hello)
            except GPError as error:
                log.warning("kernel %s cannot be served: %s", hello.kernel_id, error)
                found = protocol.refused("not_here", "this server cannot serve the kernel", final=False)
        if session not in self._strangers:
            return  # gone meanwhile
        self.session_ended(session)
        if isinstance(found, dict):
            log.warning("launcher at %s for kernel %s refused: %s", session.address, hello.kernel_id, found["text"])
            session.send(found)
            session.close()
            return
        self.sessions.add(session)
        try:
            session.accept(found, hello)
        except (ProtocolError, WireError) as error:
            session.close(f"kernel {hello.kernel_id}: {error}")

    def _sweep(self) -> None:
        now = self.loop.time()
        for session in [one for one in self.sessions if now - one.heard > SILENT_PINGS * one.ping]:
            assert session.transport is not None
            log.info("launcher session of %s is silent: closed", session.address)
            session.transport.abort()
        self.loop.call_later(SWEEP, self._sweep)


def _raise_file_limit() -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = 1 << 20
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return soft


def own_addresses(prohibited: list[str], *, six: bool = False) -> list[str]:
    """Return this machine's addresses that launchers elsewhere may reach, best first; never loopback.

    Args:
        prohibited: Patterns of those to leave out.
        six: Those of IPv6 come after those of IPv4.
    """
    import fnmatch

    import psutil
    from jupyter_client.localinterfaces import public_ips

    found: list[str] = [*public_ips()]
    if six:
        every = (
            one.address for card in psutil.net_if_addrs().values() for one in card if one.family == socket.AF_INET6
        )
        found += [ip for ip in every if "%" not in ip and not ipaddress.IPv6Address(ip).is_loopback]  # %: of a link
    return [ip for ip in found if not any(fnmatch.fnmatch(ip, pattern) for pattern in prohibited)]
