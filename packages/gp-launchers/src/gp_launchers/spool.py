"""What the kernel says on iopub while nobody can take it: a file that is bounded and never cuts a message."""

from __future__ import annotations

import os

_GREETING = 64  # bytes of a ZMTP 3 connection before its first frame
_MORE, _LONG = 1, 2  # flags of a ZMTP frame


class Messages:
    """Finds where messages end in the bytes of one ZMTP connection.

    Attributes:
        known: False if the ends cannot be told: another protocol, or CurveZMQ, which hides them.
        between: Whether the bytes until now end with a message.
    """

    def __init__(self) -> None:
        self.known = True
        self.between = False
        self._greeting = b""
        self._head = b""
        self._left = 0  # bytes of the current frame's body
        self._more = False

    def ends(self, data: bytes) -> list[int]:
        """Take the next bytes and return the positions in them at which a message has ended."""
        found: list[int] = []
        position = self._greet(data)
        while position < len(data) and self.known:
            self.between = False
            if not self._left:
                need = 1 if not self._head else 9 if self._head[0] & _LONG else 2
                part = data[position : position + need - len(self._head)]
                self._head += part
                position += len(part)
                if need == 1 or len(self._head) < need:
                    continue
                self._more = bool(self._head[0] & _MORE)
                self._left = int.from_bytes(self._head[1:], "big")
                self._head = b""
            step = min(self._left, len(data) - position)
            position += step
            self._left -= step
            if not self._left and not self._more:
                found.append(position)
                self.between = True
        return found

    def _greet(self, data: bytes) -> int:
        """Skip the greeting; return where the frames begin."""
        missing = _GREETING - len(self._greeting)
        if missing <= 0:
            return 0
        self._greeting += data[:missing]
        if len(self._greeting) == _GREETING:
            mechanism = self._greeting[12:32].rstrip(b"\0")
            self.known = self._greeting[0] == 0xFF and self._greeting[10] >= 3 and mechanism in (b"NULL", b"PLAIN")
            self.between = self.known
        return min(missing, len(data))


class Full(Exception):
    """There is no room, and the message that has begun cannot be left out any more."""


class Spool:
    """A file without a name; what goes beyond its limit is left out message by message, and counted.

    Args:
        path: Where the file is made (0600) before it loses its name.
        limit: Bytes that it holds.
        between: Whether what it takes begins with a new message.

    Attributes:
        lost_messages: Messages that were left out.
        lost_bytes: Their size.
        leaving_out: The rest of a message that was left out is still to come, so nobody else may take it.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(self, path: str, limit: int, between: bool) -> None:
        self.lost_messages = self.lost_bytes = 0
        self._limit = limit
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.unlink(path)
        self._read = self._written = 0
        self._end = 0 if between else -1  # where the last whole message ends; -1: no longer here
        self.leaving_out = False

    def __len__(self) -> int:
        return self._written - self._read

    def append(self, data: bytes, ends: list[int]) -> None:
        """Take the next bytes of the connection.

        Args:
            data: Bytes.
            ends: Where messages end in them; none if that cannot be told.

        Raises:
            Full: See there; nothing more can be taken.
        """
        if self._read > self._limit:
            self._compact()
        start = 0
        if self.leaving_out:
            if not ends:
                self.lost_bytes += len(data)
                return
            start, ends = ends[0], ends[1:]
            self.lost_messages += 1
            self.lost_bytes += start
            self.leaving_out = False
        kept = data[start:]
        if len(self) + len(kept) <= self._limit and self._write(kept):
            if ends:
                self._end = self._written - len(data) + ends[-1]
            return
        if self._end < self._read:
            raise Full
        self.lost_messages += len(ends)
        self.lost_bytes += self._written - self._end + len(kept)
        self.leaving_out = ends[-1] != len(data) if ends else bool(kept) or self._written > self._end
        self._written = self._end

    def take(self, count: int) -> bytes:
        """Return the next bytes, nothing if it is empty."""
        data = os.pread(self._file, min(count, len(self)), self._read)
        self._read += len(data)
        if self._read == self._written:
            self._end = 0 if self._end == self._written else -1
            self._read = self._written = 0
            os.ftruncate(self._file, 0)
        return data

    def close(self) -> None:
        """Delete it."""
        os.close(self._file)

    def _compact(self) -> None:
        """Move what is left to the beginning: a file that is never empty must not grow for ever."""
        position = 0
        while self._read < self._written:
            position += os.pwrite(self._file, os.pread(self._file, 1 << 20, self._read)[: len(self)], position)
            self._read += min(1 << 20, len(self))
        self._end = self._end - (self._written - position) if self._end >= self._written - position else -1
        self._read, self._written = 0, position
        os.ftruncate(self._file, position)

    def _write(self, data: bytes) -> bool:
        view, position = memoryview(data), self._written
        try:
            while view:
                count = os.pwrite(self._file, view, position)
                position += count
                view = view[count:]
        except OSError:
            return False  # the disk is full, which is a limit too
        self._written = position
        return True
