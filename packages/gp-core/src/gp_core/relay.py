"""The kernel's five channels as endpoints of this machine, carried inside the launcher's session.

The endpoints live as long as the kernel's record: they stay through lost sessions, restarts, and a launcher elsewhere.
Each connection of a client is one stream; what both ends make of streams is in `gp_launchers.streams`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import socket
import stat
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from gp_launchers.ports import PATH_MAX
from gp_launchers.streams import CHANNELS, IDLE, MAX_STREAMS, UNSENT, Stream, Streams
from gp_launchers.wire import WireError

from .errors import ENDPOINT_TAKEN, TOO_MANY_FILES, ConfigError, LaunchFailed
from .runtime import blocking, runtime, stop_listening
from .store import private_folder

log = logging.getLogger(__name__)

SUFFIX = len("-65535")  # of a channel's path at most
ENOUGH = 128 * 1024  # bytes of one client that wait for the session, until no more are read
MOST_WAITING = 2 * MAX_STREAMS  # clients of a kernel that are not admitted yet: any user of this machine can connect
NEWS = 30.0  # seconds between two times that `Relay` tells of its traffic while there is some
NOTABLE = 64 * 1024  # bytes of traffic that are worth it
PING = 5.0  # seconds of silence after which a launcher that carries channels pings: a dead path shows within 15


class Carrier(Protocol):
    """A launcher session as the relay knows it."""

    @property
    def unsent(self) -> int:
        """Bytes that wait to be sent."""

    def send_frames(self, frames: bytes) -> None:
        """Send whole frames."""


class Relay:
    """The endpoints of one kernel.

    Args:
        kernel_id: For texts.
        endpoint: ``transport``, ``ip`` and ports that clients are told; a port of 0 is chosen, and any ``ip`` of tcp is
            taken for 127.0.0.1.
        on_traffic: Told now and then that `traffic` has changed.
    """

    def __init__(
        self, kernel_id: str, endpoint: Mapping[str, Any], on_traffic: Callable[[], object] = lambda: None
    ) -> None:
        self.streams = Streams(True, on_ready=self._ready)
        self.resumes = 0
        self._on_traffic = on_traffic
        self._told_traffic = self.traffic
        self._kernel_id = kernel_id
        self._ipc = endpoint["transport"] == "ipc"
        self._ip = str(endpoint["ip"]) if self._ipc else "127.0.0.1"
        self._numbers = {name: int(endpoint.get(f"{name}_port") or 0) for name in CHANNELS}
        self._servers: dict[str, asyncio.Server] = {}
        self._clients: set[Client] = set()
        self._is_open = False
        self.entrance = asyncio.Lock()  # one after the other: of two with one identity, the kernel takes the last
        self._identity = secrets.token_hex(8)
        self._told = False  # to a launcher: what the streams are now depends on what it did with them
        self._carrier: Carrier | None = None
        self._pumping = False
        self._settling: asyncio.TimerHandle | None = None

    @property
    def endpoint(self) -> dict[str, Any]:
        """What clients are told: ``transport``, ``ip`` and the five ports."""
        ports = {f"{name}_port": number for name, number in self._numbers.items()}
        return {"transport": "ipc" if self._ipc else "tcp", "ip": self._ip, **ports}

    @property
    def traffic(self) -> dict[str, float]:
        """What went through, for people: bytes, open streams, how often a session was resumed or a reader stalled."""
        streams = self.streams
        return {
            "bytes_from_kernel": streams.bytes_in,
            "bytes_to_kernel": streams.bytes_out,
            "streams": len(streams),
            "resumes": self.resumes,
            "stalls": streams.stalls,
            "at": round(time.time(), 1),
        }

    # -- endpoints

    async def open(self) -> None:
        """Open the endpoints, or those of them that somebody has removed.

        Raises:
            LaunchFailed: One of them is taken, or there are too many open files.
            ConfigError: Its path is too long.
        """
        loop = asyncio.get_running_loop()
        self._is_open = True
        if self._ipc:
            if len(os.fsencode(self._ip)) + SUFFIX > PATH_MAX:
                raise ConfigError(
                    f"kernel {self._kernel_id}: {self._ip} is too long for the path of a socket ({PATH_MAX} bytes): "
                    "set JUPYTER_RUNTIME_DIR to a shorter folder, or let clients use tcp"
                )
            await blocking(private_folder, Path(self._ip).parent)
        for name in CHANNELS:
            if name in self._servers and not (self._ipc and await blocking(self._is_unlinked, name)):
                continue
            if old := self._servers.pop(name, None):
                stop_listening(old)
            try:
                await self._bind(loop, name)
            except OSError as error:
                raise self._failed(name, error) from None

    async def _bind(self, loop: asyncio.AbstractEventLoop, name: str) -> None:
        def client() -> Client:
            return Client(self, name)

        # kept before it listens, so that it is closed whenever this is cancelled
        if self._ipc:
            self._numbers[name] = self._numbers[name] or CHANNELS.index(name) + 1
            server = await loop.create_unix_server(client, self._path(name), backlog=128, start_serving=False)
            self._servers[name] = server
            await blocking(os.chmod, self._path(name), 0o600)
        else:
            server = await loop.create_server(client, self._ip, self._numbers[name], backlog=128, start_serving=False)
            self._servers[name] = server
            self._numbers[name] = server.sockets[0].getsockname()[1]
        await server.start_serving()

    def _path(self, name: str) -> str:
        return f"{self._ip}-{self._numbers[name]}"

    def _is_unlinked(self, name: str) -> bool:
        """Jupyter's managers remove the paths of ipc at every restart."""
        try:
            return not stat.S_ISSOCK(os.stat(self._path(name)).st_mode)
        except OSError:
            return True

    def _failed(self, name: str, error: OSError) -> LaunchFailed:
        where = self._path(name) if self._ipc else f"{self._ip} port {self._numbers[name]}"
        reason = TOO_MANY_FILES if error.errno in (errno.EMFILE, errno.ENFILE) else ENDPOINT_TAKEN
        text = f"kernel {self._kernel_id}: its {name} channel cannot listen at {where}: {error.strerror or error}"
        return LaunchFailed(text, reason=reason)

    def close(self) -> None:
        """Close the endpoints and all connections."""
        self._is_open = False
        for name, server in self._servers.items():
            stop_listening(server)
            if self._ipc:
                with contextlib.suppress(OSError):
                    os.unlink(self._path(name))
        self._servers.clear()
        for client in list(self._clients):
            client.end()
        self._carrier = None
        if self._settling is not None:
            self._settling.cancel()

    # -- the launcher's session

    def connected(self, carrier: Carrier, remembered: tuple[str, int] | None, buffer: int) -> dict[str, Any]:
        """Go on over a new session, and return what the launcher must know.

        Args:
            carrier: The session; frames may be sent once it has been answered.
            remembered: Whose streams the launcher remembers, and how many frames of theirs it has.
            buffer: Bytes that it may keep of iopub while nobody takes it.

        Raises:
            WireError: It cannot have that many.
        """
        self._carrier = None
        if remembered is not None and remembered[0] == self._identity:
            received = remembered[1]
            self._or_renew(lambda: self.streams.resume(received))
            self.resumes += 1
        elif self._told:
            self.renew()
        self._told = True
        self._carrier = carrier
        asyncio.get_running_loop().call_soon(self._pump)  # after the answer
        return {"id": self._identity, "received": self.streams.received, "blackout_buffer": buffer}

    def receive(self, kind: int, stream: int, payload: bytes) -> None:
        """Take a frame.

        Raises:
            WireError: The launcher breaks the rules.
        """
        self._pumping = True  # what it asks for is sent when the others have been taken too: see `writable`
        self._or_renew(lambda: self.streams.receive(kind, stream, payload))

    def _or_renew(self, act: Callable[[], None]) -> None:
        try:
            act()
        except WireError:
            self.renew()  # nothing can be resumed after this
            raise

    def disconnected(self) -> None:
        """The session is lost; the launcher may come back."""
        self._carrier = None

    def renew(self) -> None:
        """Close all streams, and resume none of them: the kernel or its launcher is gone."""
        self._identity, self._told = secrets.token_hex(8), False
        self.streams.reset()

    def writable(self) -> None:
        """The session can take more, or all frames that have come with one piece were received."""
        self._pump()

    def _ready(self) -> None:
        if self._carrier is not None and not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = True  # or each frame would ask for one more turn
        carrier = self._carrier
        while carrier is not None and carrier.unsent < UNSENT:
            frames = self.streams.pull_some(UNSENT - carrier.unsent)
            if not frames:
                break
            carrier.send_frames(frames)
        self._pumping = False
        if self._settling is None:
            self._settling = asyncio.get_running_loop().call_later(IDLE, self._settle)

    def send(self, stream: Stream, data: bytes) -> None:
        """Write to a stream, and to the session at once: a turn of the loop is long for a small message."""
        self._pumping = True
        stream.write(data)
        self._pump()

    def _settle(self) -> None:
        again = self.streams.settle()
        now = self.traffic
        if _differ(now, self._told_traffic):
            if now["at"] - self._told_traffic["at"] >= NEWS:
                self._told_traffic = now
                self._on_traffic()
            else:
                again = True
        self._settling = asyncio.get_running_loop().call_later(IDLE, self._settle) if again else None

    # -- clients

    async def admits(self, transport: asyncio.Transport) -> bool:
        """Say whether a client is this user's: whoever reaches iopub could read all output."""
        if self._ipc:
            return True  # the folder is ours alone
        uid = await blocking(peer_uid, transport.get_extra_info("peername"), transport.get_extra_info("sockname"))
        if uid in (None, os.getuid(), 0):
            return True
        log.warning("kernel %s: a connection of user %s was refused", self._kernel_id, uid)
        return False

    def joined(self, client: Client) -> bool:
        """Take a new client in, unless the endpoints were closed while it came, or very many wait to be admitted."""
        welcome = self._is_open and len(self._clients) - len(self.streams) < MOST_WAITING
        if welcome:
            self._clients.add(client)
        return welcome

    def left(self, client: Client) -> None:
        self._clients.discard(client)


class Client(asyncio.Protocol):
    """One connection of a client to an endpoint."""

    def __init__(self, relay: Relay, channel: str) -> None:
        self._relay = relay
        self._channel = channel
        self._transport: asyncio.Transport | None = None
        self._stream: Stream | None = None
        self._waiting = 0  # bytes that the client has not taken

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if not self._relay.joined(self):
            transport.abort()
            return
        transport.set_write_buffer_limits(0)  # what waits there is bounded by the credit
        with contextlib.suppress(OSError):
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # not at once: Python before 3.11.4 would begin to read all the same
        asyncio.get_running_loop().call_soon(transport.pause_reading)
        runtime().spawn(self._enter(transport), name="client of a kernel")

    async def _enter(self, transport: asyncio.Transport) -> None:
        async with self._relay.entrance:
            if not await self._relay.admits(transport) or transport.is_closing():
                transport.abort()
                return
            try:
                self._stream = stream = self._relay.streams.open(self._channel)
            except WireError as error:
                log.warning("a client is refused: %s", error)
                transport.abort()
                return
        stream.on_data, stream.on_closed, stream.on_drained = self._data, self.end, self._drained
        transport.resume_reading()

    # -- from the client

    def data_received(self, data: bytes) -> None:
        assert self._stream is not None
        assert self._transport is not None
        self._relay.send(self._stream, data)
        if self._stream.queued >= ENOUGH:
            self._transport.pause_reading()

    def _drained(self) -> None:
        assert self._stream is not None
        if self._stream.queued < ENOUGH // 2 and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._relay.left(self)
        if self._stream is not None:
            self._stream.close()  # what was said last still arrives, a shutdown_request for example

    # -- to the client

    def _data(self, data: bytes) -> None:
        assert self._stream is not None
        assert self._transport is not None
        self._transport.write(data)
        if self._transport.get_write_buffer_size():
            self._waiting += len(data)
        else:
            self._stream.consumed(len(data))

    def resume_writing(self) -> None:
        if self._stream is not None and self._waiting:
            count, self._waiting = self._waiting, 0
            self._stream.consumed(count)

    def end(self) -> None:
        """Close the connection after what it still has to get."""
        if self._transport is not None:
            self._transport.close()


def _differ(now: Mapping[str, float], told: Mapping[str, float]) -> bool:
    """Whether there is something to tell: a heartbeat is nothing."""
    counts = any(now[name] != told[name] for name in ("streams", "resumes", "stalls"))
    return counts or any(now[name] - told[name] >= NOTABLE for name in ("bytes_from_kernel", "bytes_to_kernel"))


def peer_uid(peer: Any, own: Any) -> int | None:
    """Return the user of the other end of a tcp connection of this machine; None where the system does not tell.

    Args:
        peer: Its address.
        own: Address of our end.
    """
    wanted = [_as_in_proc(peer), _as_in_proc(own)]
    try:
        with open("/proc/net/tcp", encoding="ascii") as table:
            for line in table:
                fields = line.split()
                if fields[1:3] == wanted:
                    return int(fields[7])
    except OSError:
        return None  # not Linux
    return -1  # gone already


def _as_in_proc(address: tuple[str, int]) -> str:
    number = int.from_bytes(socket.inet_aton(address[0]), sys.byteorder)
    return f"{number:08X}:{address[1]:04X}"
