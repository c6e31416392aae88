"""``jupyter gp ps``, ``logs``, ``stop`` and ``gc``: the kernels of this installation.

A kernel whose server is gone is not lost: it lives until its lease (``orphan_timeout``) is over, so that a restarted server
can take it over. Hence ``gc`` removes on its own only what cannot be used any more, and the rest with ``--all``.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from dataclasses import dataclass
from typing import Any

from rich.text import Text
from traitlets import TraitError
from traitlets.config import Config

from ..backend import Backend, Handle, State, Status
from ..errors import BackendError, GPError
from ..plugins import plugins
from ..runtime import runtime
from ..server import kernel_server
from ..store import Record, Store
from .command import Command
from .tables import Cell, say, show, span

DEADLINE = 10.0  # seconds for a platform to answer
STOP = 10.0  # seconds for a job to end before it is killed, and again after that
BROKEN = Status(state=State.UNKNOWN)


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
        return self.record is not None and self.record.owner is not None and self.record.owner.is_alive()

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
        return f"pid {owner.pid} at {owner.host}" if owner and self.served else "gone"

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
            "detail": self.status.detail,
            "owner": {"host": owner.host, "pid": owner.pid, "alive": self.served} if owner else None,
            "record": record is not None,
            "created": record.created if record else None,
            "age_seconds": round(self.age, 1) if self.age is not None else None,
            "orphan_timeout": record.orphan_timeout if record else None,
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


def short(kernel_id: str, every: list[Kernel]) -> str:
    """Return the first characters of an id, at least eight, that name no other kernel."""
    others = [kernel.kernel_id for kernel in every if kernel.kernel_id != kernel_id]
    for size in range(8, len(kernel_id)):
        if not any(other.startswith(kernel_id[:size]) for other in others):
            return kernel_id[:size]
    return kernel_id


# -- ps


class Ps(KernelCommand):
    """Lists kernels."""

    name = "jupyter-gp-ps"
    verb = "ps"
    summary = "List the kernels of this installation, and jobs of kernels that have no record."
    details = """\
OWNER is the server process that a kernel belongs to. When it is gone, the
kernel lives on for the time in LEASE, so that another server can take it over."""

    def run(self) -> int:
        kernels = self.wait(self._kernels())
        if self.args.json:
            self.print_json({"kernels": [kernel.data() for kernel in kernels]})
            return 0
        if not kernels:
            say("No kernels.")
            return 0
        head = ["KERNEL", "KERNELSPEC", "USER", "BACKEND", "HOST", "STATE", "OWNER", "AGE", "LEASE"]
        show(head, [_row(kernel, kernels) for kernel in kernels])
        for kernel in kernels:
            if kernel.status.detail and kernel.status.state is not State.RUNNING:
                say(f"{short(kernel.kernel_id, kernels)}: {kernel.status.detail}")
        return 0

    async def _kernels(self) -> list[Kernel]:
        kernels = await known_kernels(self.store, self.config)
        _, others = await asyncio.gather(look(kernels), strangers(kernels, self.config))
        await look(others)
        return kernels + others


def _row(kernel: Kernel, every: list[Kernel]) -> list[Cell]:
    record = kernel.record
    owner = kernel.record.owner if kernel.record else None
    return [
        short(kernel.kernel_id, every),
        record.kernel_name if record else "-",
        record.user if record else "-",
        kernel.backend_name,
        kernel.status.host or (record.host if record else None) or "-",
        Text(kernel.state, "green" if kernel.state == "running" else "yellow"),
        f"pid {owner.pid}" if owner and kernel.served else Text(kernel.owner, "yellow"),
        span(kernel.age) if kernel.age is not None else "-",
        span(record.orphan_timeout) if record else "-",
    ]


# -- logs


class Logs(KernelCommand):
    """Shows a kernel's output."""

    name = "jupyter-gp-logs"
    verb = "logs"
    summary = "Print the last lines that a kernel's job wrote."
    details = """\
A kernel that has failed or is forgotten has no record any more; its output may
still be there: give its whole id."""

    def arguments(self, group: argparse._ArgumentGroup) -> None:
        group.add_argument("kernel_id", metavar="KERNEL_ID", help="its id, or the first characters of it")
        group.add_argument("-n", type=_lines, default=50, metavar="LINES", help="how many lines; default: 50")

    def run(self) -> int:
        kernel_id, text = self.wait(self._logs(self.args.kernel_id))
        if self.args.json:
            self.print_json({"kernel_id": kernel_id, "log": text})
        elif text:
            sys.stdout.write(text.rstrip("\n") + "\n")  # as it is: a console would fold long lines
        else:
            raise GPError(f"kernel {kernel_id} has written nothing, or its platform keeps no output")
        return 0

    async def _logs(self, prefix: str) -> tuple[str, str]:
        try:
            kernel = await self.find(prefix)
        except GPError as unknown:
            for cls in plugins().backends.values():
                if text := await self._leftover(cls, prefix):
                    return prefix, text
            raise unknown
        if kernel.backend is None:
            raise GPError(f"kernel {kernel.kernel_id}: {kernel.status.detail}")
        await look([kernel])  # finds the job of a kernel without a handle
        handle = kernel.handle or {"kernel_id": kernel.kernel_id}
        try:
            text = await asyncio.wait_for(kernel.backend.logs(handle, tail=self.args.n), DEADLINE)
        except asyncio.TimeoutError:
            raise BackendError(f"{kernel.backend_name} did not answer within {DEADLINE:g} s") from None
        return kernel.kernel_id, text

    async def _leftover(self, cls: type[Backend], kernel_id: str) -> str:
        try:
            backend = cls(config=self.config)
            return await asyncio.wait_for(backend.logs({"kernel_id": kernel_id}, tail=self.args.n), DEADLINE)
        except Exception:
            return ""  # this backend cannot say it without the rest of the handle


def _lines(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of lines")
    return int(text)


# -- stop


class Stop(KernelCommand):
    """Ends a kernel."""

    name = "jupyter-gp-stop"
    verb = "stop"
    summary = "End a kernel and its job: ask first, kill it after ten seconds."
    details = """\
For kernels whose server is gone or does not react. A server that is alive
notices the end by itself, and may start the kernel again, as it does whenever
a kernel dies."""

    def arguments(self, group: argparse._ArgumentGroup) -> None:
        group.add_argument("kernel_id", metavar="KERNEL_ID", help="its id, or the first characters of it")

    def run(self) -> int:
        kernel, forced = self.wait(self._stop(self.args.kernel_id))
        left = kernel.served
        if self.args.json:
            self.print_json({"kernel_id": kernel.kernel_id, "stopped": True, "forced": forced, "record_removed": not left})
            return 0
        say(f"Kernel {kernel.kernel_id} has ended{', but had to be killed' if forced else ''}.")
        if left:
            say(f"note: its server ({kernel.owner}) is alive: it forgets the kernel, or starts it again")
        return 0

    async def _stop(self, prefix: str) -> tuple[Kernel, bool]:
        kernel = await self.find(prefix)
        forced = await end(kernel, self.store)
        return kernel, forced


async def end(kernel: Kernel, store: Store) -> bool:
    """End a kernel's job, and remove its record unless a live server will.

    Returns:
        Whether it had to be killed.

    Raises:
        GPError: It could not be ended; the record is kept.
    """
    await look([kernel])
    forced = False
    if kernel.status.state is not State.GONE:
        if kernel.backend is None or kernel.handle is None:
            raise GPError(f"kernel {kernel.kernel_id} cannot be ended from here: {kernel.status.detail}")
        forced = await _terminated(kernel.backend, kernel.handle, kernel.kernel_id)
    if kernel.record is not None and not kernel.served:
        await runtime().blocking(store.remove, kernel.kernel_id)
    return forced


async def _terminated(backend: Backend, handle: Handle, kernel_id: str) -> bool:
    for force in (False, True):
        try:
            await asyncio.wait_for(backend.terminate(handle, force=force), STOP)
            status = await _gone(backend, handle)
        except asyncio.TimeoutError:
            status = Status(state=State.UNKNOWN, detail="it does not answer")
        if status.state is State.GONE:
            return force
    raise GPError(f"kernel {kernel_id}: its job is {status.state.value} after it was killed; {status.detail}".rstrip("; "))


async def _gone(backend: Backend, handle: Handle) -> Status:
    deadline, interval = time.monotonic() + STOP, 0.05
    while True:
        status = await asyncio.wait_for(backend.look(handle), STOP)
        if status.state is State.GONE or time.monotonic() > deadline:
            return status
        await asyncio.sleep(interval)
        interval = min(interval * 1.5, 1.0)


# -- gc


class Gc(KernelCommand):
    """Removes leftovers."""

    name = "jupyter-gp-gc"
    verb = "gc"
    summary = "Remove what servers that are gone have left behind."
    details = """\
Removed are records of kernels whose job is gone. A kernel that runs without
its server waits for another one until its lease is over, and a job without a
record may belong to another installation: both are listed, and ended only with
--all. Never touched: kernels of live servers, and those whose platform does not
answer."""

    def arguments(self, group: argparse._ArgumentGroup) -> None:
        group.add_argument("--dry-run", action="store_true", help="only tell what would be done")
        group.add_argument("--all", action="store_true", help="end kernels without server or record too")

    def run(self) -> int:
        done = self.wait(self._collect())
        if self.args.json:
            self.print_json({"dry_run": self.args.dry_run, "kernels": done})
        elif not done:
            say("Nothing to remove.")
        else:
            rows = [(d["kernel_id"], d["backend"], d["found"], d["action"]) for d in done]
            show(("KERNEL", "BACKEND", "FOUND", "WOULD BE" if self.args.dry_run else "ACTION"), rows)
            if any(d["ended_by_all"] for d in done) and not self.args.all:
                say("\njupyter gp gc --all ends those that run.")
        return 1 if any(d["action"] == "failed" for d in done) else 0

    async def _collect(self) -> list[dict[str, Any]]:
        kernels = await known_kernels(self.store, self.config)
        idle = [kernel for kernel in kernels if not kernel.served]
        _, others = await asyncio.gather(look(idle), strangers(kernels, self.config))
        await look(others)
        found = [kernel for kernel in idle + others if kernel.record is not None or kernel.status.state is not State.GONE]
        return list(await asyncio.gather(*(self._one(kernel) for kernel in found)))

    async def _one(self, kernel: Kernel) -> dict[str, Any]:
        state = kernel.status.state
        lives = state in (State.RUNNING, State.PENDING)
        text = {State.GONE: "its job is gone", State.UNKNOWN: f"platform does not tell: {kernel.status.detail}"}.get(
            state, _waits(kernel) if kernel.record else "a job without record"
        )
        action = "removed" if state is State.GONE else "kept"
        if lives and self.args.all:
            action = "ended"
        if not self.args.dry_run and action != "kept":
            try:
                await end(kernel, self.store)
            except GPError as error:
                action, text = "failed", str(error)
        return {
            "kernel_id": kernel.kernel_id,
            "backend": kernel.backend_name,
            "found": text,
            "action": action,
            "ended_by_all": lives,
        }


def _waits(kernel: Kernel) -> str:
    assert kernel.record is not None
    return f"its server is gone; waits for another one up to {span(kernel.record.orphan_timeout)}"
