"""Frames and messages of the launcher session (protocol 2), for both of its ends.

A frame is ``type (1 byte), stream (4), length (4), payload``, big-endian. Type 0 on stream 0 carries one JSON object
with a ``type``; all other types belong to the kernel's channels. Whoever meets a frame type, a message type or a field
that it does not know ignores it, so that a newer end can talk to an older one.
"""

from __future__ import annotations

import json
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VERSION = 2
HEADER = struct.Struct("!BII")
MESSAGE = 0  # frame type: one JSON message, on stream 0
MAX_HELLO = 16 * 1024  # bytes of payload that a server takes before it has accepted a launcher
NOT_SENT = 128 * 1024  # bytes that the system may hold back: what is urgent waits behind them
TCP_NOTSENT_LOWAT = 25  # Linux; `socket` has it from Python 3.12 on
MAX_FRAME = 1024 * 1024  # bytes of payload afterwards


class WireError(Exception):
    """The other end sent something that is not protocol 2."""


def pack(kind: int, stream: int, payload: bytes | memoryview) -> bytes:
    """Return one frame as bytes."""
    return HEADER.pack(kind, stream, len(payload)) + payload


def pack_message(message: dict[str, Any]) -> bytes:
    """Return the frame of one message.

    Args:
        message: JSON-able dict with a ``type``.

    Raises:
        WireError: It is larger than any other end takes.
    """
    payload = json.dumps(message, separators=(",", ":")).encode()
    if len(payload) > MAX_FRAME:
        raise WireError(f"message {message.get('type')} has {len(payload)} bytes; at most {MAX_FRAME} are allowed")
    return pack(MESSAGE, 0, payload)


def unpack_message(payload: bytes) -> dict[str, Any]:
    """Return the message of a frame.

    Args:
        payload: Bytes of a frame of type `MESSAGE`.

    Raises:
        WireError: Not a JSON object with a string as ``type``.
    """
    try:
        message = json.loads(payload.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WireError(f"a message is not JSON: {error}") from None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise WireError("a message is not an object with a type")
    return message


class Decoder:
    """Cuts a byte stream into frames; keeps at most one unfinished frame of at most ``limit`` bytes.

    Args:
        limit: Largest payload in bytes; may be raised later.
    """

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> list[tuple[int, int, bytes]]:
        """Take bytes and return the list of complete frames as ``(type, stream, payload)``.

        Raises:
            WireError: A frame is larger than the limit; the stream cannot be read any further.
        """
        frames: list[tuple[int, int, bytes]] = []
        view, start = memoryview(data), 0
        if self._buffer:  # the unfinished frame gets what it lacks and no more, so that the others are copied once
            for _ in ("header", "payload"):
                lacks = self._size(self._buffer, 0) - len(self._buffer)
                self._buffer += view[start : start + lacks]
                start += lacks
            if not self._cut(memoryview(self._buffer), 0, frames):
                return frames
            self._buffer = bytearray()
        while size := self._cut(view, start, frames):
            start += size
        if start < len(view):
            self._buffer += view[start:]
        return frames

    def _cut(self, data: memoryview, start: int, frames: list[tuple[int, int, bytes]]) -> int:
        """Add the frame that begins there and return its size; 0 if it is unfinished."""
        end = start + self._size(data, start)
        if len(data) < end:
            return 0
        kind, stream, _ = HEADER.unpack_from(data, start)
        frames.append((kind, stream, bytes(data[start + HEADER.size : end])))
        return end - start

    def _size(self, data: bytearray | memoryview, start: int) -> int:
        """Return the size of the frame that begins there: of its header, as long as that is unfinished."""
        if len(data) - start < HEADER.size:
            return HEADER.size
        length: int = HEADER.unpack_from(data, start)[2]
        if length > self.limit:
            raise WireError(f"a frame of {length} bytes; at most {self.limit} are allowed")
        return HEADER.size + length
