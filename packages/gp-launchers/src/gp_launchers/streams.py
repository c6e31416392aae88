"""The kernel's channels inside the session: byte streams with credit, which outlive the connection under them.

Used by both ends, and does no I/O: frames go in by `Streams.receive` and come out by `Streams.pull`. Both ends count
the frames of this module. A sender keeps each until it is acknowledged; after a lost connection each end says how many
it has received, and the rest is sent again. So what was written to a stream arrives once and in order, or the stream
is closed.

Memory is bounded on both ends: what was sent and may be lost, by `KEPT`; what was received and is not passed on, by
the credit that was given: `BASE` for each stream, and `POOL` for those that want more. What waits to be sent is the
business of each stream's owner, who looks at `Stream.queued`.
"""

from __future__ import annotations

import struct
from collections import deque

from .wire import HEADER, WireError, pack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable

OPEN, DATA, CLOSE, CREDIT, RETURN, WANT, ACK = 1, 2, 3, 4, 5, 6, 7
"""Frame types. All but ACK are counted."""

CHANNELS = ("shell", "iopub", "stdin", "control", "hb")
URGENT = ("control", "hb")  # these overtake the others

CHUNK = 128 * 1024 - HEADER.size  # bytes of one frame at most, four TLS records: what an interrupt may have to wait for
MAX_STREAMS = 128
BASE = 8 * 1024  # bytes of credit that a stream always has
WINDOW = 512 * 1024  # bytes of credit that it may come to
POOL = 1024 * 1024  # bytes of credit beyond BASE of all streams together
KEPT = 1536 * 1024  # bytes sent and not acknowledged, until no more DATA is sent
LONGEST_KEPT = 2 * KEPT  # with the frames that must be sent all the same
ACK_EVERY = 384 * 1024  # bytes received until they are acknowledged
ACK_ALONG = 96 * 1024  # likewise, when other frames are sent anyway
UNSENT = 128 * 1024  # bytes that wait in a session, until no more frames are given to it
IDLE = 2.0  # seconds after which unused credit is given back
OVERHEAD = 100  # bytes that a frame costs beyond its own

_NUMBER = struct.Struct("!I")
_COUNT = struct.Struct("!Q")


class Stream:
    """One connection of a client to a channel of the kernel.

    Args:
        streams: All of the kernel.
        number: Same at both ends.
        channel: One of `CHANNELS`.

    Attributes:
        queued: Bytes that were written and are not sent; the owner stops to write when there are too many.
        on_data: Told of bytes that have come; the owner says `consumed` when it has passed them on.
        on_closed: Told that the other end has closed the stream, or that its state is lost.
        on_drained: Told that ``queued`` became less.
    """

    __slots__ = (
        "channel",
        "closing",
        "credit",
        "granted",
        "grown",
        "moved",
        "number",
        "on_closed",
        "on_data",
        "on_drained",
        "owed",
        "queue",
        "queued",
        "stalled",
        "streams",
        "used",
        "waiting",
        "wanted",
        "window",
    )

    def __init__(self, streams: Streams, number: int, channel: str) -> None:
        self.streams = streams
        self.number = number
        self.channel = channel
        self.queued = 0
        self.on_data: Callable[[bytes], object] = _ignore
        self.on_closed: Callable[[], object] = _nothing
        self.on_drained: Callable[[], object] = _nothing
        # as a sender
        self.queue: deque[bytes | memoryview] = deque()
        self.credit = BASE  # bytes that we may send
        self.grown = False  # it had more than BASE, which is to be given back
        self.used = False  # since the last `Streams.settle`
        self.waiting = False  # for its turn to send
        self.closing = False
        # as a receiver: window = granted + received and not consumed + owed
        self.window = BASE
        self.granted = BASE  # bytes that the other end may send
        self.owed = 0  # bytes consumed and not granted again
        self.wanted = False  # the other end has used up its credit and has more to send
        # either way, since the last `Streams.settle`
        self.moved = False
        self.stalled = False

    def write(self, data: bytes) -> None:
        """Send bytes, after those that wait already; without effect on a closed stream."""
        if data and not self.closing:
            self.queue.append(data)
            self.queued += len(data)
            self.streams.has_data(self)

    def consumed(self, count: int) -> None:
        """Take note that received bytes have left our memory, so that as many may follow."""
        self.moved = True
        self.owed += count
        if 2 * self.owed >= self.window or self.granted == 0:
            self.streams.grant(self)

    def close(self) -> None:
        """Close as soon as all is sent that was written; nothing that comes in is told any more."""
        if not self.closing:
            self.closing = True
            self.on_data, self.on_closed, self.on_drained = self._swallow, _nothing, _nothing
            if not self.queue:
                self.streams.finish(self)

    def abort(self) -> None:
        """Close at once; what waits to be sent is dropped."""
        self.drop_queue()
        self.close()

    def drop_queue(self) -> None:
        """Forget what waits to be sent."""
        self.queue.clear()
        self.queued = 0

    def _swallow(self, data: bytes) -> None:
        self.consumed(len(data))


class Streams:
    """All streams of one kernel at one end.

    Args:
        opener: This end opens streams (the server's); the other may not.
        on_open: Told of a stream that the other end opened.
        on_ready: Told that there may be something to `pull`; must not pull by itself.

    Attributes:
        received: Frames that have come.
        bytes_in: Payload that has come on all streams.
        bytes_out: Payload that was sent.
        stalls: How often nobody took what there was on some stream, from one `settle` to the next.
    """

    def __init__(
        self,
        opener: bool,
        on_open: Callable[[Stream], object] = lambda stream: None,
        on_ready: Callable[[], object] = lambda: None,
    ) -> None:
        self.bytes_in = self.bytes_out = self.stalls = 0
        self._opener = opener
        self._on_open = on_open
        self._on_ready = on_ready
        self._begin()

    def _begin(self) -> None:
        self.received = 0
        self._streams: dict[int, Stream] = {}
        self._opened = 0  # highest number
        self._turns: tuple[deque[Stream], deque[Stream]] = (deque(), deque())  # with data and credit; urgent, others
        self._control: deque[bytes] = deque()  # frames that need no credit
        self._kept: deque[bytes] = deque()  # sent, not acknowledged
        self._kept_bytes = 0
        self._again: deque[bytes] = deque()  # the last of `_kept`, to be sent again
        self._acknowledged = 0  # frames of ours that have arrived
        self._unacknowledged = 0  # bytes that have come since our last ACK
        self._pool = POOL

    def __len__(self) -> int:
        return len(self._streams)

    # -- for the owner

    def open(self, channel: str) -> Stream:
        """Open a stream to a channel of the kernel.

        Raises:
            WireError: There are too many.
        """
        if len(self._streams) >= MAX_STREAMS:
            raise WireError(f"a kernel can have {MAX_STREAMS} connections at most")
        self._opened += 1
        stream = self._streams[self._opened] = Stream(self, self._opened, channel)
        self._say(OPEN, stream, channel.encode())
        return stream

    def pull(self) -> bytes:
        """Return the next frame to send, or nothing."""
        if self._again:
            return self._again.popleft()
        if self._unacknowledged >= (ACK_ALONG if self._control else ACK_EVERY):
            self._unacknowledged = 0
            return pack(ACK, 0, _COUNT.pack(self.received))
        if self._control:
            return self._keep(self._control.popleft())
        if self._kept_bytes < KEPT:
            for turns in self._turns:
                if turns:
                    return self._data(turns.popleft())
        return b""

    def pull_some(self, size: int) -> bytes:
        """Return the next frames, until they have some size; they go into few TLS records."""
        frames = []
        while size > 0:
            frame = self.pull()
            if not frame:
                break
            frames.append(frame)
            size -= len(frame)
        return frames[0] if len(frames) == 1 else b"".join(frames)

    def resume(self, received: int) -> None:
        """Go on over a new connection.

        Args:
            received: How many of our frames the other end has.

        Raises:
            WireError: It cannot have that many, or it had more before.
        """
        self._forget(received)
        self._again = deque(self._kept)
        self._on_ready()

    def reset(self) -> None:
        """Begin anew with another end that knows nothing of before: all streams are closed."""
        lost = list(self._streams.values())
        self._begin()
        for stream in lost:
            stream.closing = True
            stream.drop_queue()
            stream.on_closed()

    def settle(self) -> bool:
        """Give back the credit of streams that sent nothing since the last call; return whether to call again."""
        again = False
        for stream in self._streams.values():
            stuck = not stream.granted or bool(stream.queue and not stream.credit)
            was_stalled, stream.stalled = stream.stalled, stuck and not stream.moved
            self.stalls += stream.stalled and not was_stalled
            stream.moved = False
            again = again or stuck
            if stream.grown and not stream.queue:
                if stream.used:
                    stream.used = False
                    again = True
                else:
                    stream.grown = False
                    surplus = max(0, stream.credit - BASE)
                    stream.credit -= surplus
                    self._say(RETURN, stream, _NUMBER.pack(surplus))
        return again

    # -- for streams

    def has_data(self, stream: Stream) -> None:
        """Let a stream wait for its turn, if it may send."""
        if stream.queue and stream.credit and not stream.waiting:
            stream.waiting = True
            self._turns[stream.channel not in URGENT].append(stream)
            self._on_ready()

    def grant(self, stream: Stream) -> None:
        """Give credit for what was consumed, and more to a stream that wants it."""
        if self._streams.get(stream.number) is not stream:
            return
        growth = min(3 * stream.window, WINDOW - stream.window, self._pool) if stream.wanted else 0
        stream.wanted = False
        self._pool -= growth
        stream.window += growth
        count, stream.owed = stream.owed + growth, 0
        stream.granted += count
        self._say(CREDIT, stream, _NUMBER.pack(count))

    def finish(self, stream: Stream) -> None:
        """Tell the other end that a stream is closed."""
        if self._streams.get(stream.number) is stream:
            self._say(CLOSE, stream, b"")
            self._drop(stream)

    # -- for the other end

    def receive(self, kind: int, number: int, payload: bytes) -> None:
        """Take a frame.

        Raises:
            WireError: The other end breaks the rules; the session cannot go on.
        """
        if kind == ACK:
            self._forget(_unpacked(_COUNT, payload))
            return
        if not OPEN <= kind <= WANT:
            return  # of a newer version, which does not count it either
        self.received += 1
        self._unacknowledged += len(payload) + OVERHEAD
        if kind == OPEN:
            self._open_other(number, payload)
        elif not 0 < number <= self._opened:
            raise WireError(f"stream {number} was never opened")
        elif number in self._streams:  # else closed by us, which the other end did not know yet
            self._take(kind, self._streams[number], payload)
        if self._kept_bytes + OVERHEAD * len(self._control) > LONGEST_KEPT:
            raise WireError("the other end does not acknowledge what it gets")
        if self._unacknowledged >= ACK_EVERY:
            self._on_ready()

    def _open_other(self, number: int, payload: bytes) -> None:
        channel = payload.decode("ascii", "replace")
        if self._opener or number != self._opened + 1 or channel not in CHANNELS or len(self._streams) >= MAX_STREAMS:
            raise WireError(f"stream {number} of {channel[:20]!r} must not be opened")
        self._opened = number
        stream = self._streams[number] = Stream(self, number, channel)
        self._on_open(stream)

    def _take(self, kind: int, stream: Stream, payload: bytes) -> None:
        if kind == DATA:
            if len(payload) > stream.granted:
                raise WireError(f"stream {stream.number} sends more than it has credit for")
            stream.granted -= len(payload)
            stream.moved = True
            self.bytes_in += len(payload)
            stream.on_data(payload)
        elif kind == CLOSE:
            stream.closing = True
            stream.drop_queue()
            self._drop(stream)
            stream.on_closed()
        elif kind == CREDIT:
            stream.credit += _unpacked(_NUMBER, payload)
            if stream.credit > WINDOW:
                raise WireError(f"stream {stream.number} is given more credit than there is")
            stream.grown = stream.grown or stream.credit > BASE
            self.has_data(stream)
        elif kind == RETURN:
            count = _unpacked(_NUMBER, payload)
            if count > min(stream.granted, stream.window - BASE):
                raise WireError(f"stream {stream.number} returns credit that it does not have")
            stream.granted -= count
            surplus = min(stream.owed, stream.window - count - BASE)  # nor is this wanted any more
            stream.owed -= surplus
            stream.window -= count + surplus
            self._pool += count + surplus
        else:
            stream.wanted = True

    # -- parts

    def _say(self, kind: int, stream: Stream, payload: bytes) -> None:
        self._control.append(pack(kind, stream.number, payload))
        self._on_ready()

    def _data(self, stream: Stream) -> bytes:
        """Return the next frame of a stream whose turn it is, and queue it for its next turn."""
        data = stream.queue.popleft()
        size = min(len(data), stream.credit, CHUNK)
        if size < len(data):
            data = memoryview(data)  # what is cut is not copied
            stream.queue.appendleft(data[size:])
            data = data[:size]
        stream.credit -= size
        stream.used = stream.moved = True
        stream.queued -= size
        stream.waiting = False
        self.bytes_out += size
        frame = self._keep(pack(DATA, stream.number, data))
        if stream.queue and not stream.credit:
            self._say(WANT, stream, b"")
        self.has_data(stream)
        if stream.closing and not stream.queue:
            self.finish(stream)
        stream.on_drained()
        return frame

    def _keep(self, frame: bytes) -> bytes:
        self._kept.append(frame)
        self._kept_bytes += len(frame) + OVERHEAD
        return frame

    def _forget(self, received: int) -> None:
        count = received - self._acknowledged
        if not 0 <= count <= len(self._kept) - len(self._again):
            raise WireError(f"{received} frames are acknowledged, which cannot be")
        self._acknowledged = received
        for _ in range(count):
            self._kept_bytes -= len(self._kept.popleft()) + OVERHEAD
        if count:
            self._on_ready()

    def _drop(self, stream: Stream) -> None:
        del self._streams[stream.number]
        self._pool += stream.window - BASE
        if stream.waiting:
            stream.waiting = False
            self._turns[stream.channel not in URGENT].remove(stream)


def _unpacked(form: struct.Struct, payload: bytes) -> int:
    if len(payload) != form.size:
        raise WireError("a number has the wrong size")
    number: int = form.unpack(payload)[0]
    return number


def _ignore(data: bytes) -> None:
    pass


def _nothing() -> None:
    pass
