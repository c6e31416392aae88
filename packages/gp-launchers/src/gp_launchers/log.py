"""The launcher's log: its own lines and the kernel's standard error, never a secret."""

from __future__ import annotations

import os
import stat
import time

_CHUNK = 4096  # POSIX: a pipe that polls as writable takes this much without blocking
_LARGEST = 32 * 1024 * 1024  # bytes of a file; beyond, only the newest lines are kept
_KEPT = 1024 * 1024


class Log:
    """Writes to standard error or to a 0600 file and never blocks: what a stuck reader does not take is dropped.

    A file that is appended to stays small, whoever opened it: a kernel may complain for weeks.

    Args:
        path: File to append to; empty: standard error.
        kernel_id: Shown in every line.
    """

    def __init__(self, path: str, kernel_id: str) -> None:
        self._fd = 2
        self._kernel_id = kernel_id
        self._dropped = 0
        self._unchecked = 0  # bytes since the file's size was looked at
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
            self._unchecked += len(data)
            if self._unchecked > _KEPT:
                self._unchecked = 0
                self._cut()
        except OSError:
            pass  # the reader is gone or the disk is full: the kernel matters more than its log

    def _cut(self) -> None:
        import fcntl

        found = os.fstat(self._fd)
        appended = fcntl.fcntl(self._fd, fcntl.F_GETFL) & os.O_APPEND  # else a hole would take the place of what goes
        if not (stat.S_ISREG(found.st_mode) and appended and found.st_size > _LARGEST):
            return
        newest = b""
        try:
            with open(f"/dev/fd/{self._fd}", "rb") as file:
                file.seek(-_KEPT, os.SEEK_END)
                newest = file.read(_KEPT).partition(b"\n")[2]
        except OSError:
            pass  # it may be written only, here
        os.ftruncate(self._fd, 0)
        note = b"[gp-launcher: older lines were dropped, %d bytes]\n" % (found.st_size - len(newest))
        os.write(self._fd, note + newest)
