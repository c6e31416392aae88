"""The kernels of this installation, as their records and their platforms know them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from traitlets import TraitError
from traitlets.config import Config

from gp_launchers.supervisor import FIRST_ACCEPTANCE

from ..backend import Backend, Handle, State, Status
from ..errors import GPError
from ..plugins import plugins
from ..runtime import runtime
from ..server import kernel_server
from ..store import Record, Store
from .command import Command
from .tables import span

DEADLINE = 10.0  # seconds for a platform to answer
BROKEN = Status(state=State.UNKNOWN)


@dataclass(frozen=True)
class Left:
    """What is left of a lease.

    Args:
        seconds: Until the launcher ends kernel and itself.
        at_most: The server was killed, and nobody knows when: it may be less.
    """

    seconds: float
    at_most: bool

    def __str__(self) -> str:
        return f"{'at most' if self.at_most else 'about'} {span(self.seconds)}"


@dataclass
class Kernel:
    """A kernel as its record, its platform, or both know it.

    Args:
        kernel_id: Its identifier.
        backend_name: As in the record.
        backend: None if it cannot be used here; ``status.detail`` says why.
        record: None for a job that was discovered and that nobody here knows.
        handle: None if the backend never told one.
        status: Of its job.
    """

    kernel_id: str
    backend_name: str
    backend: Backend | None
    record: Record | None
    handle: Handle | None
    status: Status = BROKEN

    @property
    def served(self) -> bool:
        """Whether a server that is alive takes care of it; one on another machine is believed to."""
        return self.record is not None and self.record.is_owned

    @property
    def state(self) -> str:
        """One word for people."""
        job = self.status.state
        if self.record is not None and job in (State.RUNNING, State.PENDING):
            return "pending" if job is State.PENDING else self.record.state
        return job.value

    @property
    def owner(self) -> str:
        """Whose it is, in words."""
        if self.record is None:
            return "no record"
        owner = self.record.owner
        return str(owner) if owner and self.served else "gone"

    @property
    def lease(self) -> float | None:
        """Seconds without a server until its launcher ends it; None if nothing ends it."""
        record = self.record
        return record.orphan_timeout if record is not None and record.launcher_protocol != 1 else None

    @property
    def lease_left(self) -> Left | None:
        """How much of the lease is left of a kernel without a server; None if that is not counted."""
        record, lease = self.record, self.lease
        if record is None or lease is None or self.served or self.status.state is State.GONE:
            return None
        if record.secret is None:  # no server has accepted its launcher yet
            lease = min(lease, FIRST_ACCEPTANCE)
        if record.left is None:  # killed: nobody knows when
            return Left(lease, at_most=True)
        return Left(max(0.0, record.left + lease - time.time()), at_most=False)

    @property
    def age(self) -> float | None:
        """Seconds since its start."""
        return time.time() - self.record.created if self.record and self.record.created else None

    def data(self) -> dict[str, Any]:
        """What programs get; no secret."""
        record, owner = self.record, self.record.owner if self.record else None
        return {
            "kernel_id": self.kernel_id,
            "kernel_name": record.kernel_name if record else None,
            "user": record.user if record else None,
            "backend": self.backend_name,
            "host": self.status.host or (record.host if record else None),
            "state": self.state,
            "job": self.status.state.value,
            "handle": self.handle,
            "detail": self.status.detail,
            "owner": {"host": owner.host, "pid": owner.pid, "alive": self.served} if owner else None,
            "record": record is not None,
            "created": record.created if record else None,
            "age_seconds": round(self.age, 1) if self.age is not None else None,
            "channels": {"mode": record.channels, "traffic": record.traffic} if record else None,
            "orphan_timeout": record.orphan_timeout if record else None,
            "lease_left": asdict(self.lease_left) if self.lease_left else None,
        }


# -- finding kernels; on the runtime's loop


async def known_kernels(store: Store, config: Config) -> list[Kernel]:
    """Return the kernels of the store, oldest first, with a usable backend where there is one; asks no platform."""
    found = []
    for record in await runtime().blocking(store.list):
        kernel = Kernel(record.kernel_id, record.backend, None, record, record.handle)
        try:
            kernel.backend = plugins().backend(record.backend)(config=config, **record.options)
        except (GPError, TraitError, TypeError) as error:
            kernel.status = Status(state=State.UNKNOWN, detail=str(error).splitlines()[0])
        found.append(kernel)
    return found


async def strangers(kernels: list[Kernel], config: Config) -> list[Kernel]:
    """Return jobs that exist out there and have no record, as far as the backends tell in time."""
    mine = {kernel.kernel_id for kernel in kernels}

    async def of(cls: type[Backend]) -> list[Kernel]:
        try:
            backend = cls(config=config)
            handles = await asyncio.wait_for(plugins().discover(backend, None), DEADLINE)
        except (asyncio.TimeoutError, GPError, TraitError):
            return []  # `jupyter gp doctor` tells what is wrong with it
        return [
            Kernel(str(handle["kernel_id"]), cls.name, backend, None, handle)
            for handle in handles
            if handle.get("kernel_id") not in mine
        ]

    every = await asyncio.gather(*(of(cls) for cls in plugins().backends.values()))
    return [kernel for found in every for kernel in found]


async def look(kernels: list[Kernel]) -> None:
    """Ask every kernel's platform, all at once; one that does not answer in time is UNKNOWN."""
    await asyncio.gather(*(_look(kernel) for kernel in kernels))


async def _look(kernel: Kernel) -> None:
    if kernel.backend is None:
        return
    try:
        kernel.status = await asyncio.wait_for(_status(kernel, kernel.backend), DEADLINE)
    except asyncio.TimeoutError:
        kernel.status = Status(state=State.UNKNOWN, detail=f"no answer within {DEADLINE:g} s")


async def _status(kernel: Kernel, backend: Backend) -> Status:
    if kernel.handle is None:
        if kernel.served:
            return Status(state=State.PENDING, detail="its server is launching it")
        try:
            # not the hook: it hides a platform that does not answer, which must not look like a job that is gone
            found = await backend.discover(kernel.kernel_id)
        except Exception as error:
            return Status(state=State.UNKNOWN, detail=str(error))
        if not found:
            return Status(state=State.GONE, detail="it was never launched")
        kernel.handle = found[0]
    return await backend.look(kernel.handle)


class KernelCommand(Command):
    """What the commands about kernels share."""

    @property
    def store(self) -> Store:
        return kernel_server(self.config).store

    async def find(self, prefix: str) -> Kernel:
        """Return the one kernel whose id begins so: with a record, or else a job without one.

        Raises:
            GPError: None, or several.
        """
        kernels = await known_kernels(self.store, self.config)
        matching = _matching(kernels, prefix) or _matching(await strangers(kernels, self.config), prefix)
        if not matching:
            raise GPError(f"no kernel {prefix!r} is known here; jupyter gp ps lists them")
        if len(matching) > 1:
            raise GPError(f"{prefix!r} begins {len(matching)} kernel ids: {', '.join(k.kernel_id for k in matching)}")
        return matching[0]


def _matching(kernels: list[Kernel], prefix: str) -> list[Kernel]:
    exact = [kernel for kernel in kernels if kernel.kernel_id == prefix]
    return exact or [kernel for kernel in kernels if kernel.kernel_id.startswith(prefix)]


def short(kernel_id: str, every: Iterable[str]) -> str:
    """Return the first characters of an id, at least eight, that begin no other one."""
    others = [other for other in every if other != kernel_id]
    for size in range(8, len(kernel_id)):
        if not any(other.startswith(kernel_id[:size]) for other in others):
            return kernel_id[:size]
    return kernel_id
