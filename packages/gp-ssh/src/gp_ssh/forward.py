"""Launchers that call back through ssh: their connections to a port of the host become connections to our listener.

One thread carries all connections of a host: a thread for each end of each connection would be four hundred of them for
two hundred kernels, and one for all hosts would wait for that one whose ssh connection hangs.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import selectors
import socket
import threading

import paramiko

from gp_core import BackendError

from .connection import Connection, ConnectionFailed

log = logging.getLogger(__name__)

PIECE = 64 * 1024
ENOUGH = 256 * 1024  # bytes that wait for one end, until no more are read from the other
SOON = 0.01  # seconds until a full window of a channel is looked at again: paramiko tells nobody when it opens
PATIENT = 2.0  # seconds without anything to carry until the carrier looks whether channels were closed


class Forward:
    """A port of the host's loopback whose connections come to our listener; it stays the same over new connections.

    Args:
        address: ``host`` and ``port`` of our listener on this machine.
        port: Of the host; 0: any.

    Attributes:
        callers: Kernels whose launchers use it.
    """

    def __init__(self, address: tuple[str, int], port: int = 0) -> None:
        self.address = address
        self.port = port
        self.callers: set[str] = set()
        self._carrier: Carrier | None = None
        self._attached: Connection | None = None
        self._attaching = threading.Lock()
        self._beginning = threading.Lock()  # not the other one: paramiko may wait for both

    def attach(self, connection: Connection) -> None:
        """Ask a connection for the port, unless it has it; blocks.

        Raises:
            BackendError: The host's sshd does not allow it, or another process has the port by now.
        """
        with self._attaching:
            if connection is self._attached:
                return
            try:
                self.port = connection.forward(self.port, self)
            except ConnectionFailed:
                raise
            except BackendError as error:
                where = f" at its port {self.port}" if self.port else ""
                raise BackendError(f"{connection.target.name} does not forward connections{where}: {error}") from None
            self._attached = connection

    def detach(self) -> None:
        """Let the port go; blocks."""
        with self._attaching:
            if self._attached is not None:
                self._attached.cancel(self.port)
                self._attached = None

    def add(self, channel: paramiko.Channel) -> None:
        """Carry a connection that has come in, from any thread; never called if ssh carries by itself."""
        with self._beginning:
            self._carrier = self._carrier or Carrier(self.address)
        self._carrier.add(channel)

    def close(self) -> None:
        """End all connections."""
        if self._carrier is not None:
            self._carrier.close()


class _Pair:
    """Two ends, and what waits for each."""

    def __init__(self, channel: paramiko.Channel, peer: socket.socket) -> None:
        self.channel, self.peer = channel, peer
        self.arrived = channel.fileno()  # readable when the channel is
        self.to_channel, self.to_peer = bytearray(), bytearray()
        self.ended = False  # by our listener, whose last words may still wait

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.channel.close()
        self.peer.close()


class Carrier:
    """The thread that carries connections.

    Args:
        listener: ``host`` and ``port`` where they end.
    """

    def __init__(self, listener: tuple[str, int]) -> None:
        self._listener = listener
        self._closed = False
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._new: collections.deque[paramiko.Channel] = collections.deque()
        self._pairs: set[_Pair] = set()
        threading.Thread(target=self._run, name="gp-ssh forward", daemon=True).start()

    def add(self, channel: paramiko.Channel) -> None:
        """Carry one more connection; returns at once, from any thread."""
        if self._closed:
            channel.close()
            return
        self._new.append(channel)
        self._wake.send(b".")

    def close(self) -> None:
        """End all connections and the thread; returns at once, from any thread."""
        self._closed = True
        self._wake.send(b".")

    def _run(self) -> None:
        while not self._closed:
            self._turn()
        for pair in list(self._pairs):
            self._end(pair)
        for channel in self._new:
            channel.close()
        self._selector.close()
        self._woken.close()
        self._wake.close()

    def _turn(self) -> None:
        full = any(pair.to_channel for pair in self._pairs)
        ready = self._selector.select(SOON if full else PATIENT)
        touched = {key.data for key, _ in ready if key.data is not None}
        if len(touched) < len(ready):
            with contextlib.suppress(BlockingIOError):
                self._woken.recv(4096)
        while self._new:
            self._begin(self._new.popleft())
        for pair in list(self._pairs) if full or not ready else touched & self._pairs:
            try:
                self._carry(pair)
            except (OSError, EOFError, paramiko.SSHException) as error:
                log.debug("a forwarded connection ends: %s", error)
                self._end(pair)

    def _begin(self, channel: paramiko.Channel) -> None:
        peer = None
        try:
            peer = socket.create_connection(self._listener, 2.0)  # of this machine: it answers at once or never
            peer.setblocking(False)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            channel.settimeout(0.0)
            pair = _Pair(channel, peer)
        except OSError as error:
            log.warning("a launcher calls through ssh; our listener at %s port %d: %s", *self._listener, error)
            channel.close()
            if peer is not None:
                peer.close()
            return
        self._pairs.add(pair)
        self._watch(pair)

    def _carry(self, pair: _Pair) -> None:
        """Move what can be moved; EOFError at the end of either."""
        while len(pair.to_peer) < ENOUGH and pair.channel.recv_ready():
            pair.to_peer += pair.channel.recv(PIECE)
        with contextlib.suppress(BlockingIOError):
            while pair.to_peer:
                del pair.to_peer[: pair.peer.send(pair.to_peer)]
        with contextlib.suppress(BlockingIOError):
            while len(pair.to_channel) < ENOUGH and not pair.ended:
                piece = pair.peer.recv(PIECE)
                pair.ended = not piece
                pair.to_channel += piece
        with contextlib.suppress(TimeoutError):
            while pair.to_channel:
                count = pair.channel.send(bytes(pair.to_channel[:PIECE]))
                if not count:
                    raise EOFError("by the launcher")
                del pair.to_channel[:count]
        if pair.ended and not pair.to_channel:
            raise EOFError("by our listener")
        if not pair.to_peer and (pair.channel.closed or pair.channel.eof_received) and not pair.channel.recv_ready():
            raise EOFError("by the launcher")
        self._watch(pair)

    def _watch(self, pair: _Pair) -> None:
        self._want(pair.arrived, selectors.EVENT_READ if len(pair.to_peer) < ENOUGH else 0, pair)
        reading = selectors.EVENT_READ if len(pair.to_channel) < ENOUGH and not pair.ended else 0
        self._want(pair.peer.fileno(), reading | (selectors.EVENT_WRITE if pair.to_peer else 0), pair)

    def _want(self, end: int, events: int, pair: _Pair | None = None) -> None:
        known = self._selector.get_map().get(end)
        if known is None and events:
            self._selector.register(end, events, pair)
        elif known is not None and not events:
            self._selector.unregister(end)
        elif known is not None and known.events != events:
            self._selector.modify(end, events, pair)

    def _end(self, pair: _Pair) -> None:
        self._pairs.discard(pair)
        self._want(pair.arrived, 0)
        self._want(pair.peer.fileno(), 0)
        pair.close()
