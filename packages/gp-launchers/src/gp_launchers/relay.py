"""The far end of the kernel's channels: each stream of the session is a connection to the kernel here."""

from __future__ import annotations

import errno
import os
import socket

from . import wire
from .errors import StartError
from .loop import READ, WRITE
from .spool import Full, Messages, Spool
from .streams import IDLE, UNSENT, Streams

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable

    from .log import Log
    from .loop import Loop, Timer
    from .ports import Ports
    from .session import Session
    from .streams import Stream

PIECE = 128 * 1024  # bytes read at a time
ENOUGH = 256 * 1024  # bytes that wait for the session, until no more are read (iopub: until they go to the spool)
SMALL = 16 * 1024  # bytes read at a time from a kernel that says little: a large buffer is mapped each time
LARGE = 1024 * 1024  # bytes, more than any piece: once that was freed, glibc keeps as much at hand
LAST = 64  # pieces that are read after a kernel's end
AGAIN = 0.05  # seconds between attempts to connect
BUFFER = 64 * 1024 * 1024  # bytes of a spool, unless the server says otherwise
_LOOPBACK = {"*": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


class Relay:
    """All connections to the kernel.

    Args:
        loop: Runs them.
        session: Returns the session that is accepted, or None.
        folder: Private one, for what iopub says while nobody takes it.
        log: Takes what goes wrong.
    """

    def __init__(self, loop: Loop, session: Callable[[], Session | None], folder: Callable[[], str], log: Log) -> None:
        self.streams = Streams(False, self._opened, self._ready)
        bytearray(LARGE)  # see there
        self.identity: str | None = None  # the server's name for its end of the streams
        self.buffer = BUFFER
        self.lost_messages = self.lost_bytes = 0  # of iopub, because nobody took them in time
        self.folder = folder
        self.loop = loop
        self.log = log
        self.ports: Ports | None = None  # of a kernel that listens
        self._session = session
        self._channels: set[Channel] = set()
        self._pumping = False
        self._idle: Timer | None = None

    def hello(self) -> dict[str, Any]:
        """Return what the server must know to resume."""
        return {"id": self.identity, "received": self.streams.received}

    def accepted(self, told: Any) -> None:
        """Go on with the streams where both ends can, or begin anew.

        Raises:
            WireError: The server's count is impossible.
        """
        if not isinstance(told, dict):
            return  # a server that relays nothing
        identity, received, buffer = (told.get(name) for name in ("id", "received", "blackout_buffer"))
        if not isinstance(identity, str) or type(received) is not int:
            raise wire.WireError("accepted: relay is malformed")
        if type(buffer) is int and buffer >= 0:
            self.buffer = buffer
        if identity == self.identity:
            self.streams.resume(received)
        else:
            self.streams.reset()
            self.identity = identity

    def forget(self) -> None:
        """Do not resume any more: the ends do not agree."""
        self.identity = None

    def kernel_listens(self, ports: Ports) -> None:
        """Connect the streams that waited for the kernel."""
        self.ports = ports
        for channel in list(self._channels):
            channel.connect()

    def kernel_ended(self) -> None:
        """Close all streams to the kernel after its last words: a new one must not get what was meant for it."""
        self.ports = None
        for channel in list(self._channels):
            channel.kernel_ended()

    def close(self) -> None:
        """Let go of everything."""
        for channel in list(self._channels):
            channel.gone()

    def pump(self, everything: bool = False) -> None:
        """Give frames to the session until it has enough.

        Args:
            everything: All that may be sent, because there will be no other time.
        """
        self._pumping = True  # or each frame would ask for one more turn
        session = self._session()
        while session is not None and (everything or session.unsent < UNSENT):
            frames = self.streams.pull_some(max(1, UNSENT - session.unsent))
            if not frames:
                break
            session.send_frames(frames)
        self._pumping = False

    def send(self, stream: Stream, data: bytes) -> None:
        """Write to a stream, and to the session at once: a turn of the loop is long for a small message."""
        self._pumping = True
        stream.write(data)
        self.pump()

    def dropped(self, messages: int, size: int) -> None:
        """Count output that was left out; the server is told by the next `report`."""
        self.lost_messages += messages
        self.lost_bytes += size
        if messages:
            self.report()

    def report(self) -> None:
        """Tell the server of output that was left out."""
        session = self._session()
        if session is not None and self.lost_messages:
            session.send({"type": "dropped", "messages": self.lost_messages, "bytes": self.lost_bytes})

    def discard(self, channel: Channel) -> None:
        """Forget a channel that is closed."""
        self._channels.discard(channel)

    def _opened(self, stream: Stream) -> None:
        channel = Channel(self, stream)
        self._channels.add(channel)
        channel.connect()

    def _ready(self) -> None:
        if not self._pumping and self._session() is not None:
            self._pumping = True
            self.loop.after(0, self.pump)
        if self._idle is None:
            self._idle = self.loop.after(IDLE, self._settle)

    def _settle(self) -> None:
        again = self.streams.settle()
        self._idle = self.loop.after(IDLE, self._settle) if again else None


class Channel:
    """One stream and its connection to the kernel."""

    def __init__(self, relay: Relay, stream: Stream) -> None:
        self._used = False  # it was connected, so what comes is for that kernel and no later one
        self._relay = relay
        self._stream = stream
        self._socket: socket.socket | None = None
        self._connected = False
        self._gone = False
        self._timer: Timer | None = None
        self._piece = SMALL
        self._out = bytearray()  # for the kernel; bounded by the credit that the server has
        # the kernel throws away what its subscribers on iopub do not take, so that channel is read always
        self._messages = Messages() if stream.channel == "iopub" else None
        self._spool: Spool | None = None
        stream.on_data = self._data
        stream.on_closed = self.gone
        stream.on_drained = self._drained

    # -- connecting

    def connect(self) -> None:
        """Connect to the kernel, if it listens; only once."""
        ports = self._relay.ports
        if ports is None or self._socket is not None or self._used:
            return
        number = ports.numbers[f"{self._stream.channel}_port"]
        target: Any = ports.path(number) if ports.ipc else (_LOOPBACK.get(ports.ip, ports.ip), number)
        try:
            self._socket = socket.socket(socket.AF_UNIX if ports.ipc else ports.family(), socket.SOCK_STREAM)
            self._socket.setblocking(False)
            if not ports.ipc:
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            code = self._socket.connect_ex(target)
        except OSError as error:
            code = error.errno or errno.EIO
        if code in (0, errno.EINPROGRESS):
            assert self._socket is not None
            self._relay.loop.watch(self._socket.fileno(), WRITE, self._finished)
        else:
            self._refused(code)

    def _finished(self, _events: int) -> None:
        assert self._socket is not None
        code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._refused(code)
            return
        self._connected = self._used = True
        self._watch()

    def _refused(self, code: int) -> None:
        """Try again: stdin and heartbeat may come up after the other channels."""
        self._drop_socket()
        if self._gone:
            self._release()
            return
        if code in (errno.EMFILE, errno.ENFILE):
            self._relay.log("no more files can be opened: a client of %s waits", self._stream.channel)
        self._timer = self._relay.loop.after(AGAIN, self.connect)

    # -- to the kernel

    def _data(self, data: bytes) -> None:
        self._out += data
        if self._connected:
            self._write()

    def _write(self) -> None:
        assert self._socket is not None
        try:
            while self._out:
                count = self._socket.send(self._out)
                del self._out[:count]
                self._stream.consumed(count)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.end()
            return
        if self._gone and not self._out:
            self.gone()
        else:
            self._watch()

    # -- from the kernel

    def _watch(self) -> None:
        if self._socket is not None and self._connected:
            events = (READ if self._wants_more() else 0) | (WRITE if self._out else 0)
            if events:
                self._relay.loop.watch(self._socket.fileno(), events, self._happened)
            else:
                self._relay.loop.unwatch(self._socket.fileno())

    def _wants_more(self) -> bool:
        return not self._gone and (self._messages is not None or self._stream.queued < ENOUGH)

    def _happened(self, events: int) -> None:
        if events & WRITE:
            self._write()
        if events & READ and self._socket is not None:
            self._read()

    def _read(self) -> bool:
        """Take some bytes from the kernel; return whether there may be more."""
        assert self._socket is not None
        try:
            data = self._socket.recv(self._piece)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            data = b""
        self._piece = PIECE if len(data) >= SMALL else SMALL
        if not data:
            self.end()
        elif self._messages is not None:
            self._tell(data, self._messages)
        else:
            self._relay.send(self._stream, data)
            if not self._wants_more():
                self._watch()
        return self._socket is not None

    def _tell(self, data: bytes, messages: Messages) -> None:
        between = messages.between
        ends = messages.ends(data)
        if self._spool is None and self._stream.queued < ENOUGH:
            self._relay.send(self._stream, data)
            return
        try:
            if self._spool is None:
                path = os.path.join(self._relay.folder(), f"spool-{os.urandom(4).hex()}")
                self._spool = Spool(path, self._relay.buffer, between)
            self._spool.append(data, ends)
            self._drained()  # there may be nothing to wait for
        except (Full, OSError, StartError) as error:
            self._relay.log("iopub: a connection is given up, its output cannot be kept: %r", error)
            self._relay.dropped(1, len(data))
            self.end()

    def _drained(self) -> None:
        if self._stream.queued < ENOUGH // 2:
            if self._spool is not None:
                self._stream.write(self._spool.take(PIECE))
                if not self._spool and not self._spool.leaving_out:
                    self._close_spool()
            elif self._messages is None:
                self._watch()

    # -- the end

    def kernel_ended(self) -> None:
        """Read what a kernel that is dead has left; who never reached it waits for the next one."""
        if self._used:
            for _ in range(LAST):  # a child of the kernel may go on for ever
                if self._socket is None or not self._read():
                    break
            self.end()

    def end(self) -> None:
        """The kernel has closed the connection: what it said still goes out, then the stream is closed."""
        self._drop_socket()
        self._relay.loop.cancel(self._timer)
        if self._spool is not None:
            self._stream.on_drained = self._drain_last
            self._drain_last()
        else:
            self._release()
            self._stream.close()

    def _drain_last(self) -> None:
        while self._spool is not None and self._stream.queued < ENOUGH:
            self._stream.write(self._spool.take(PIECE))
            if not self._spool:
                self._close_spool()
                self._release()
                self._stream.close()

    def gone(self) -> None:
        """The client has gone, or the server: nobody hears the rest, but the kernel still gets what was said."""
        self._gone = True
        self._close_spool()
        if self._out and self._socket is not None:
            self._watch()
        else:
            self._drop_socket()
            self._release()

    def _release(self) -> None:
        self._relay.loop.cancel(self._timer)
        self._relay.discard(self)

    def _close_spool(self) -> None:
        if self._spool is not None:
            self._relay.dropped(self._spool.lost_messages, self._spool.lost_bytes)
            self._spool.close()
            self._spool = None

    def _drop_socket(self) -> None:
        self._connected = False
        if self._socket is not None:
            self._relay.loop.unwatch(self._socket.fileno())
            self._socket.close()
            self._socket = None
