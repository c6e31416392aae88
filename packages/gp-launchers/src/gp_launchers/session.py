"""One TLS connection to a server: connect, check the pin, say hello, exchange frames."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import ssl
import sys
import time

from . import wire
from .loop import READ, WRITE
from .tls import PIECE, decrypt, room

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol, Sequence

    from .loop import Loop, Timer

    class Listener(Protocol):
        """Whoever is told what a session meets."""

        def on_frame(self, session: Session, kind: int, stream: int, payload: bytes) -> None:
            """A frame has come."""

        def on_sent(self, session: Session) -> None:
            """What was queued is with the system now, or most of it."""

        def on_closed(self, session: Session, why: str, refused: bool) -> None:
            """The session is over; ``refused``: there is no server of ours at this address."""


DEADLINE = 10.0  # seconds for connect and handshake, and again for the server's answer to `hello`


class TlsUnsupported(Exception):
    """This Python cannot speak TLS 1.3."""


def make_context() -> ssl.SSLContext:
    """Return a context for TLS 1.3 that leaves the certificate to the pin.

    Raises:
        TlsUnsupported: This Python has no TLS 1.3.
    """
    if not getattr(ssl, "HAS_TLSv1_3", False):
        raise TlsUnsupported(f"this Python has {ssl.OPENSSL_VERSION}, which has no TLS 1.3")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # self-signed; `Session` compares its hash before it sends anything
    return context


class Session:
    """A connection to one address of a server.

    Args:
        loop: Runs it.
        context: See `make_context`.
        address: Family and socket address.
        pins: SHA-256 of the certificates to trust, in hexadecimal.
        hello: First message.
        listener: Is told of frames and of the end.
    """

    def __init__(
        self,
        loop: Loop,
        context: ssl.SSLContext,
        address: tuple[int, Any],
        pins: Sequence[str],
        hello: dict[str, Any],
        listener: Listener,
    ) -> None:
        self.name = "{} port {}".format(*address[1][:2])
        self.accepted = False
        self.last_received = time.monotonic()
        self._loop = loop
        self._context = context
        self._address = address
        self._pins = pins
        self._hello = hello
        self._listener = listener
        self._decoder = wire.Decoder()
        # an SSLSocket would call the system twice for each record that it reads, and once for each that it sends
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._out = memoryview(b"")  # encrypted, not taken by the system
        self._socket: socket.socket | None = None
        self._tls: ssl.SSLObject | None = None
        self._shaken = self._over = False
        self._piece, self._room = memoryview(bytearray(PIECE)), room()
        self._deadline: Timer | None = None
        self._ping: Timer | None = None
        self._ping_every = 0.0
        self._pings = 0

    def open(self) -> None:
        """Start to connect."""
        family, target = self._address
        self._deadline = self._loop.after(DEADLINE, lambda: self.close(f"no connection within {DEADLINE:g} s"))
        try:
            self._socket = socket.socket(family, socket.SOCK_STREAM)
            self._socket.setblocking(False)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # unacknowledged data: the path is dead, whatever TCP hopes
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30000)
            if sys.platform == "linux":
                self._socket.setsockopt(socket.IPPROTO_TCP, wire.TCP_NOTSENT_LOWAT, wire.NOT_SENT)
            code = self._socket.connect_ex(target)
        except OSError as error:
            self._fail(error)
            return
        if code not in (0, errno.EINPROGRESS):
            self._fail(OSError(code, os.strerror(code)))
            return
        self._loop.watch(self._socket.fileno(), WRITE, self._connected)

    def accept(self, ping: float) -> None:
        """Take note that the server accepted us.

        Args:
            ping: Seconds of silence after which we ask whether it is still there.
        """
        self.accepted = True
        self._loop.cancel(self._deadline)
        self._loop.cancel(self._ping)
        self._ping_every = ping
        self._ping = self._loop.after(ping, self._keep_alive)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message on stream 0."""
        self.send_frames(wire.pack_message(message))

    def send_frames(self, frames: bytes) -> None:
        """Send whole frames of any type."""
        if self._tls is not None:
            try:
                self._tls.write(frames)
            except (OSError, ValueError) as error:
                self.close(f"lost: {error}")
                return
            self._write()

    @property
    def unsent(self) -> int:
        """Bytes that are queued here."""
        return len(self._out) + self._outgoing.pending

    def close(self, why: str, refused: bool = False) -> None:
        """End the connection and tell the listener; safe to repeat."""
        if self._forget():
            self._listener.on_closed(self, why, refused)

    def finish(self, seconds: float) -> None:
        """Send what is queued and close, waiting for the server at most some seconds; the listener is not told."""
        end = time.monotonic() + seconds
        if self._tls is not None and self._socket is not None:
            try:
                self._socket.settimeout(seconds)
                self._close_tls(self._tls)
                self._socket.sendall(self._out)
                self._socket.sendall(self._outgoing.read())
                # Then read on: closing with unread data makes TCP throw away what we have just sent.
                self._socket.shutdown(socket.SHUT_WR)
                while self._socket.recv_into(self._piece) and time.monotonic() < end:
                    pass
            except OSError:
                pass
        self._forget()

    @staticmethod
    def _close_tls(tls: ssl.SSLObject) -> None:
        try:
            tls.unwrap()
        except (OSError, ValueError):
            pass  # close_notify is written, the server's has not come yet

    def _forget(self) -> bool:
        if self._over:
            return False
        self._over = True
        self._loop.cancel(self._deadline)
        self._loop.cancel(self._ping)
        if self._socket is not None:  # else there was none to be had, of a family that this machine lacks
            self._loop.unwatch(self._socket.fileno())
            self._socket.close()
        self._socket = self._tls = None
        return True

    def _fail(self, error: OSError) -> None:
        self.close(str(error.strerror or error), error.errno == errno.ECONNREFUSED)

    def _connected(self, _events: int) -> None:
        assert self._socket is not None
        code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._fail(OSError(code, os.strerror(code)))
            return
        try:
            self._tls = self._context.wrap_bio(self._incoming, self._outgoing)
        except (OSError, ValueError) as error:
            self.close(f"TLS: {error}")
            return
        self._shake(self._tls)

    def _shake(self, tls: ssl.SSLObject) -> None:
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            self._write()
            return
        except (OSError, ValueError) as error:
            self.close(f"TLS handshake: {error}")
            return
        pin = hashlib.sha256(tls.getpeercert(True) or b"").hexdigest()
        if pin not in self._pins:
            self.close(f"the certificate there has the pin {pin}, not ours: another server", refused=True)
            return
        self._shaken = True
        self._loop.cancel(self._deadline)
        self._deadline = self._loop.after(DEADLINE, lambda: self.close(f"no answer to hello within {DEADLINE:g} s"))
        self.send(self._hello)

    def _ready(self, events: int) -> None:
        try:
            if events & WRITE:
                self._write()
                self._listener.on_sent(self)
            if events & READ:
                self._read()
        except Exception:  # an error of ours costs the session, which is dialled again: the kernel is worth more
            import traceback

            self.close(traceback.format_exc())

    def _read(self) -> None:
        """Take what has come, at most a piece: other descriptors want their turn too."""
        if self._socket is None or self._tls is None:
            return
        try:
            size = self._socket.recv_into(self._piece)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(f"lost: {error}")
            return
        if not size:
            self.close("closed by the server")
            return
        self.last_received = time.monotonic()
        self._incoming.write(self._piece[:size])
        if not self._shaken:
            self._shake(self._tls)
        if self._shaken and self._tls is not None:  # hello may have found the connection broken
            self._decrypt(self._tls)

    def _decrypt(self, tls: ssl.SSLObject) -> None:
        """Pass on the frames that have come."""
        try:
            size, ended = decrypt(tls, self._room)
        except (OSError, ValueError) as error:
            self.close(f"lost: {error}")
            return
        try:
            for frame in self._decoder.feed(self._room[:size]):
                if self._socket is not None:
                    self._listener.on_frame(self, *frame)
        except wire.WireError as error:
            self.close(f"not protocol 2: {error}")
        if ended:
            self.close("closed by the server")

    def _write(self) -> None:
        if self._socket is None:
            return
        try:
            while self._out or self._outgoing.pending:
                if not self._out:
                    self._out = memoryview(self._outgoing.read())
                self._out = self._out[self._socket.send(self._out) :]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self.close(f"lost: {error}")
            return
        self._loop.watch(self._socket.fileno(), READ | WRITE if self._out else READ, self._ready)

    def _keep_alive(self) -> None:
        silence = time.monotonic() - self.last_received
        every = self._ping_every
        if silence >= 2.5 * every - 0.001:
            self.close(f"the server has been silent for {silence:.0f} s")
            return
        if silence < every - 0.001:
            self._ping = self._loop.after(every - silence, self._keep_alive)
            return
        self._pings += 1
        self._ping = self._loop.after(min(every, 2.5 * every - silence), self._keep_alive)
        self.send({"type": "ping", "n": self._pings})
