"""``jupyter gp ps`` and ``jupyter gp logs``."""

from __future__ import annotations

import argparse
import asyncio
import sys

from rich.text import Text

from ..backend import Backend, State
from ..errors import BackendError, GPError
from ..plugins import plugins
from .kernels import DEADLINE, Kernel, KernelCommand, known_kernels, look, short, strangers
from .tables import Cell, say, show, span


class Ps(KernelCommand):
    """Lists kernels."""

    name = "jupyter-gp-ps"
    verb = "ps"
    summary = "List the kernels of this installation, and jobs of kernels that have no record."
    details = """\
OWNER is the server process that a kernel belongs to. When it is gone, the
kernel lives on for the time in LEASE, so that another server can take it over.
How much of that is left is told below the table: exactly if the server ended
properly, else at most, because nobody knows when it was killed."""

    def run(self) -> int:
        kernels = self.wait(self._kernels())
        if self.args.json:
            self.print_json({"kernels": [kernel.data() for kernel in kernels]})
            return 0
        if not kernels:
            say("No kernels.")
            return 0
        head = ["KERNEL", "KERNELSPEC", "USER", "BACKEND", "HOST", "STATE", "OWNER", "AGE", "LEASE"]
        ids = [kernel.kernel_id for kernel in kernels]
        show(head, [_row(kernel, short(kernel.kernel_id, ids)) for kernel in kernels])
        for kernel in kernels:
            if kernel.status.detail and kernel.status.state is not State.RUNNING:
                say(f"{short(kernel.kernel_id, ids)}: {kernel.status.detail}")
            if kernel.lease_left is not None:
                say(f"{short(kernel.kernel_id, ids)}: {_orphaned(kernel)}")
        return 0

    async def _kernels(self) -> list[Kernel]:
        kernels = await known_kernels(self.store, self.config)
        _, others = await asyncio.gather(look(kernels), strangers(kernels, self.config))
        await look(others)
        return kernels + others


def _orphaned(kernel: Kernel) -> str:
    owner = kernel.record.owner if kernel.record else None
    whose = f"its server ({owner})" if owner else "its server"
    return f"{whose} is gone; {kernel.lease_left} left for another one to take it over"


def _row(kernel: Kernel, shown: str) -> list[Cell]:
    record = kernel.record
    owner = kernel.record.owner if kernel.record else None
    return [
        shown,
        record.kernel_name if record else "-",
        record.user if record else "-",
        kernel.backend_name,
        kernel.status.host or (record.host if record else None) or "-",
        Text(kernel.state, "green" if kernel.state == "running" else "yellow"),
        f"pid {owner.pid}" if owner and kernel.served else Text(kernel.owner, "yellow"),
        span(kernel.age) if kernel.age is not None else "-",
        span(kernel.lease) if kernel.lease is not None else "-",
    ]


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
