"""The record of every kernel that this installation started: six methods, 0600 files in a 0700 folder by default."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import re
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import psutil

from .errors import StoreError
from .runtime import blocking

log = logging.getLogger(__name__)
FORMAT = 1


@dataclass(frozen=True)
class Owner:
    """The process that a kernel belongs to; a lease that ends when the process does."""

    host: str
    pid: int
    started: float

    @classmethod
    def me(cls) -> Owner:
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def __str__(self) -> str:
        return f"pid {self.pid} at {self.host}"

    def is_alive(self) -> bool:
        """Whether the owner still runs; the owner on another machine is believed to."""
        if self.host != socket.gethostname():
            return True
        try:
            process = psutil.Process(self.pid)
            # a zombie does nothing any more, and may stay for ever in a container whose first process does not reap
            return abs(process.create_time() - self.started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


@dataclass(kw_only=True)
class Record:
    """All that another server needs to take a running kernel over.

    Args:
        kernel_id: The kernel's identifier.
        kernel_name: Name of its kernelspec.
        user: Whom policy counts it for.
        backend: Name of the backend.
        options: Values of the backend's options from the kernelspec, so that any process can use the handle.
        handle: The backend's; None while the backend is being asked.
        connection: Connection file of the kernel, key and curve keys included; a wildcard ``ip`` stands for ``host``.
        port_range: Where the kernel may listen.
        token: SHA-256 of the launch token.
        secret: SHA-256 of the launcher's session secret; None until it first called back.
        run: How often the kernel was started inside its launcher.
        state: "starting", "running" or "exited".
        host: Where the kernel runs.
        owner: Whose it is.
        left: When its owner said goodbye without ending it, in seconds since the epoch; None: it did not.
        bind: ``host:port`` that its launcher calls back to; several are separated by commas.
        pins: Certificates that its launcher trusts, as `Identity` has them; empty if the record is an old one.
        launcher_protocol: 1: its launcher never calls back again, and has no lease.
        channels: "relay": ``connection`` is what its server listens on, and its launcher carries the rest; or "direct".
        blackout_buffer: Bytes of output that the launcher keeps while nobody takes it.
        traffic: What has gone through relayed channels, as `Relay.traffic` told it last.
        orphan_timeout: Seconds without a server until the launcher ends the kernel.
        created: Seconds since the epoch.
    """

    kernel_id: str
    kernel_name: str
    user: str
    backend: str
    options: dict[str, Any] = field(default_factory=dict)
    handle: dict[str, Any] | None = None
    connection: dict[str, Any] = field(default_factory=dict, repr=False)
    port_range: str = "0..0"
    token: str = field(default="", repr=False)
    secret: str | None = field(default=None, repr=False)
    run: int = 1
    state: str = "starting"
    host: str | None = None
    owner: Owner | None = None
    left: float | None = None
    bind: str = ""
    pins: str = ""
    launcher_protocol: int = 2
    channels: str = "direct"
    blackout_buffer: int = 0
    traffic: dict[str, Any] | None = None
    orphan_timeout: float = 600.0
    created: float = 0.0

    @property
    def is_owned(self) -> bool:
        """Whether it belongs to a process that lives."""
        return self.owner is not None and self.owner.is_alive()

    @property
    def endpoints(self) -> dict[str, Any]:
        """What a client needs to connect; the host is the platform's word, not the launcher's."""
        info = dict(self.connection)
        if info.get("ip") in ("0.0.0.0", "::"):
            info["ip"] = self.host or "127.0.0.1"
        return info

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **vars(self), "owner": asdict(self.owner) if self.owner else None})

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Read a record; fields of a newer version are ignored.

        Raises:
            StoreError: Not a record.
        """
        try:
            data = json.loads(text)
            known = {item.name: data[item.name] for item in fields(cls) if item.name in data}
            known["owner"] = Owner(**known["owner"]) if known.get("owner") else None
            made = cls(**known)
            numbers = (made.run, made.created, made.orphan_timeout)
            if not all(isinstance(number, (int, float)) for number in numbers):
                raise StoreError("not a record of a kernel: a number is none")
            if not all(
                isinstance(value, dict)
                for value in (made.options, made.connection, made.handle or {}, made.traffic or {})
            ):
                raise StoreError("not a record of a kernel: an object is none")
            return made
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise StoreError(f"not a record of a kernel: {error}") from None


class Store(Protocol):
    """Where records live; all methods may block and are called on worker threads."""

    def put(self, record: Record) -> None: ...
    def get(self, kernel_id: str) -> Record | None: ...
    def remove(self, kernel_id: str) -> None: ...
    def list(self) -> list[Record]: ...
    def sweep(self) -> None: ...

    def take(self, kernel_id: str, owner: Owner) -> Record | None:
        """Make a process the owner of a kernel whose owner is gone; of several that try at once one succeeds.

        Args:
            kernel_id: The kernel's.
            owner: The process that asks; if the kernel is its own already, that is fine.

        Returns:
            The record as it is now; with another owner, who is alive, if there is nothing to take. None: no record.
        """


def file_name(kernel_id: str) -> str:
    """Return a kernel's id if it may be part of a path.

    Raises:
        StoreError: Not with these characters.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", kernel_id):
        raise StoreError(f"kernel id {kernel_id[:40]!r} cannot be a file name: use letters, digits, - and _")
    return kernel_id


class FileStore:
    """One JSON file per kernel.

    Args:
        folder: Created 0700 at the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, kernel_id: str) -> Path:
        return self.folder / f"{file_name(kernel_id)}.json"

    def put(self, record: Record) -> None:
        """Write a record so that a crash leaves the old or the new one.

        Raises:
            StoreError: Disk full, read-only, or not ours.
        """
        path = self._path(record.kernel_id)
        try:
            private_folder(self.folder)
            write_private(path, record.to_json().encode())
        except OSError as error:
            raise StoreError(f"the record of kernel {record.kernel_id} cannot be written: {error}") from None

    def get(self, kernel_id: str) -> Record | None:
        """Return a kernel's record, or None if there is none that can be read."""
        path = self._path(kernel_id)
        return self._read(path) if path.exists() else None

    def remove(self, kernel_id: str) -> None:
        """Forget a kernel; one that is unknown is fine.

        Raises:
            StoreError: The record stays, for example because the disk is read-only.
        """
        try:
            self._path(kernel_id).unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"the record of kernel {kernel_id} cannot be removed: {error}") from None

    def take(self, kernel_id: str, owner: Owner) -> Record | None:
        """Make a process the owner of a kernel whose owner is gone; see `Store.take`.

        Raises:
            StoreError: The record cannot be locked or written.
        """
        path = self._path(kernel_id)
        try:
            with _locked(path) as exists:
                record = self._read(path) if exists else None
                if record is None or record.is_owned:
                    return record
                record = replace(record, owner=owner, left=None)
                self.put(record)
                return record
        except OSError as error:
            raise StoreError(f"the record of kernel {kernel_id} cannot be locked: {error}") from None

    def list(self) -> list[Record]:
        """Return all records, oldest first; files that are none of ours are reported and skipped.

        Raises:
            StoreError: The folder is somebody else's.
        """
        try:
            paths = [*self.folder.glob("*.json")] if self.folder.is_dir() else []
        except OSError as error:
            raise StoreError(f"the records in {self.folder} cannot be read: {error}") from None
        read = (self._read(path) for path in paths)
        return sorted((record for record in read if record), key=lambda record: record.created)

    def sweep(self) -> None:
        """Delete what processes that were killed had begun to write: it may hold a kernel's keys."""
        with contextlib.suppress(OSError):
            for path in self.folder.glob(".*-*"):
                writer = path.name[1:].partition("-")[0]
                # a while, because the writer may be in another container, which has numbers of its own
                if writer.isdecimal() and not psutil.pid_exists(int(writer)) and time.time() - path.stat().st_mtime > 1:
                    path.unlink(missing_ok=True)

    def _read(self, path: Path) -> Record | None:
        try:
            info = path.stat()
            if info.st_uid != os.getuid() or not stat.S_ISREG(info.st_mode):
                raise StoreError("it belongs to somebody else")
            record = Record.from_json(path.read_text())
            if record.kernel_id != path.stem:
                raise StoreError(f"it holds kernel {record.kernel_id[:40]}")
            return record
        except (OSError, UnicodeDecodeError, StoreError) as error:
            log.warning("%s is skipped: %s", path, error)
            return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Lock a record against other processes that want to take it; yields whether there is one.

    The lock is on the file itself: a file beside it would have to be removed one day, which has races of its own. A
    record that was replaced while we waited is another file, so it is looked for again.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # NFS locks only what is open for writing
        except FileNotFoundError:
            yield False
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, path):
                yield True
                return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


class InTurn:
    """One kernel's use of a store, in the order in which it was asked for.

    A write whose caller was cancelled still happens on its thread, and must not come after the removal that follows.
    A record whose turn has not come gives way to a newer one: both callers wait for that.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._last: asyncio.Task[None] | None = None
        self._queued: list[Record] | None = None  # what the last one will write, until its turn has come

    async def put(self, record: Record) -> None:
        """Write a record.

        Raises:
            StoreError: See `FileStore.put`.
        """
        if self._queued is not None:
            self._queued[0] = record
        else:
            self._queued = queued = [record]
            self._append(lambda: self._store.put(queued[0]), queued)
        await self._done()

    async def remove(self, kernel_id: str) -> None:
        """Forget a kernel.

        Raises:
            StoreError: See `FileStore.remove`.
        """
        self._queued = None
        self._append(lambda: self._store.remove(kernel_id))
        await self._done()

    def _append(self, use: Callable[[], None], queued: list[Record] | None = None) -> None:
        before = self._last

        async def turn() -> None:
            if before is not None and not before.done():
                await asyncio.wait({before})
            if self._queued is queued:
                self._queued = None
            await blocking(use)

        self._last = asyncio.create_task(turn())
        self._last.add_done_callback(lambda task: task.cancelled() or task.exception())  # retrieved, if nobody waits

    async def _done(self) -> None:
        assert self._last is not None
        await asyncio.shield(self._last)


def private_folder(folder: Path) -> None:
    """Make a folder that only this user can enter.

    Raises:
        OSError: It cannot be made, or it belongs to another user.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = folder.stat()
    if info.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to user {info.st_uid}")
    if info.st_mode & 0o077:
        folder.chmod(0o700)


def write_private(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Write a file atomically and durably; mode 0600.

    Args:
        path: Of the file.
        data: Its contents.
        replace: Also if it exists; else the one that another process has just made stays.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{os.getpid()}-")  # 0600 from the first byte
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(name, path)
        else:
            with contextlib.suppress(FileExistsError):
                os.link(name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):  # replaced
            os.unlink(name)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
