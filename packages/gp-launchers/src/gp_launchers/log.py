"""The launcher's log: its own lines and the kernel's standard error, never a secret."""

from __future__ import annotations

import os
import stat
import time

_CHUNK = 4096  # POSIX: a pipe that polls as writable takes this much without blocking


class Log:
    """Writes to standard error or to a 0600 file and never blocks: what a stuck reader does not take is dropped.

    Args:
        path: File to append to; empty: standard error.
        kernel_id: Shown in every line.
    """

    def __init__(self, path: str, kernel_id: str) -> None:
        self._fd = 2
        self._kernel_id = kernel_id
        self._dropped = 0
        if path:
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
                self._fd = os.open(path, flags, 0o600)
                if stat.S_ISREG(os.fstat(self._fd).st_mode):  # /dev/null and the like are everybody's
                    os.fchmod(self._fd, 0o600)
            except OSError as error:
                self("cannot write the log to %s (%s): it goes to standard error", path, error.strerror)

    def __call__(self, text: str, *args: object) -> None:
        """Write one line; ``args`` are filled in as `%` does."""
        line = (text % args if args else text).rstrip("\n")
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self.copy((f"{stamp} gp-launcher {self._kernel_id}: {line}\n").encode("utf-8", "backslashreplace"))

    def copy(self, data: bytes) -> None:
        """Write bytes as they are."""
        for start in range(0, len(data), _CHUNK):
            chunk = data[start : start + _CHUNK]
            if self._dropped and self._writable():
                self._write(b"\n[gp-launcher: %d bytes dropped, nobody read them]\n" % self._dropped)
                self._dropped = 0
            if self._writable():
                self._write(chunk)
            else:
                self._dropped += len(chunk)

    def _writable(self) -> bool:
        import select

        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        return bool(poll.poll(0))

    def _write(self, data: bytes) -> None:
        try:
            os.write(self._fd, data)
        except OSError:
            pass  # the reader is gone or the disk is full: the kernel matters more than its log
