"""``jupyter gp stop`` and ``jupyter gp gc``.

A kernel whose server is gone is not lost: it lives until its lease (``orphan_timeout``) is over, so that a restarted
server can take it over. Hence ``gc`` removes by itself only what cannot be used any more, and the rest with ``--all``.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

from ..backend import Backend, Handle, State, Status
from ..errors import GPError
from ..runtime import runtime
from ..store import Store
from .kernels import Kernel, KernelCommand, known_kernels, look, short, strangers
from .tables import say, show

STOP = 10.0  # seconds for a job to end before it is killed, and again after that


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
            data = {"kernel_id": kernel.kernel_id, "stopped": True, "forced": forced, "record_removed": not left}
            self.print_json(data)
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
    elif kernel.backend is not None and kernel.handle is not None:
        # frees what the job still holds
        await asyncio.wait_for(kernel.backend.terminate(kernel.handle, force=True), STOP)
    if kernel.record is not None and not kernel.served:
        await runtime().blocking(store.remove, kernel.kernel_id)
    return forced


async def _terminated(backend: Backend, handle: Handle, kernel_id: str) -> bool:
    status = Status(state=State.UNKNOWN)
    for force in (False, True):
        try:
            await asyncio.wait_for(backend.terminate(handle, force=force), STOP)
            status = await _gone(backend, handle)
        except asyncio.TimeoutError:
            status = Status(state=State.UNKNOWN, detail=f"no answer within {STOP:g} s")
        if status.state is State.GONE:
            return force
    detail = f": {status.detail}" if status.detail else ""
    raise GPError(f"kernel {kernel_id} was told to end and killed, but its job is {status.state.value}{detail}")


async def _gone(backend: Backend, handle: Handle) -> Status:
    deadline, interval = time.monotonic() + STOP, 0.05
    while True:
        status = await asyncio.wait_for(backend.look(handle), STOP)
        if status.state is State.GONE or time.monotonic() > deadline:
            return status
        await asyncio.sleep(interval)
        interval = min(interval * 1.5, 1.0)


class Gc(KernelCommand):
    """Removes leftovers."""

    name = "jupyter-gp-gc"
    verb = "gc"
    summary = "Remove what servers that are gone have left behind."
    details = """\
Removed are records of kernels whose job is gone, and what such jobs have left
on their platform, such as containers. A kernel that runs without its server
waits for another one until its lease is over, and a job without a record may
belong to another installation: both are listed, and ended only with --all.
Never touched: kernels of live servers, and those whose platform does not
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
            ids = [d["kernel_id"] for d in done]
            rows = [(short(d["kernel_id"], ids), d["backend"], d["found"], d["action"]) for d in done]
            show(("KERNEL", "BACKEND", "FOUND", "WOULD BE" if self.args.dry_run else "ACTION"), rows)
            if any(d["ended_by_all"] for d in done) and not self.args.all:
                say("\njupyter gp gc --all ends those that run.")
        return 1 if any(d["action"] == "failed" for d in done) else 0

    async def _collect(self) -> list[dict[str, Any]]:
        if not self.args.dry_run:
            await runtime().blocking(self.store.sweep)
        kernels = await known_kernels(self.store, self.config)
        idle = [kernel for kernel in kernels if not kernel.served]
        _, others = await asyncio.gather(look(idle), strangers(kernels, self.config))
        await look(others)
        return list(await asyncio.gather(*(self._one(kernel) for kernel in idle + others)))

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
            except (GPError, asyncio.TimeoutError) as error:
                action, text = "failed", str(error) or f"no answer within {STOP:g} s"
        return {
            "kernel_id": kernel.kernel_id,
            "backend": kernel.backend_name,
            "found": text,
            "action": action,
            "ended_by_all": lives,
        }


def _waits(kernel: Kernel) -> str:
    waiting = f", {kernel.lease_left}" if kernel.lease_left else ""
    return f"its server is gone; waits for another one{waiting}"
