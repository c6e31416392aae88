"""``jupyter gp demo``: a kernel through the whole protocol, beside a plain local one; leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager, NoSuchKernel
from jupyter_client.manager import AsyncKernelManager
from traitlets.config import Config

from ..errors import GPError
from ..runtime import runtime
from ..server import kernel_server
from .command import Command
from .tables import console, say, show

PATIENCE = 60.0  # seconds for each step
CELL = "6 * 7"
LOOP = "while True: pass"
PARENT = "__import__('os').getppid()"  # the launcher, or this process


class Demo(Command):
    """Shows a kernel's life, with times."""

    name = "jupyter-gp-demo"
    verb = "demo"
    summary = "Show a kernel that is started through the whole protocol on this machine."
    details = """\
Beside it the same with a plain local kernel. Needs ipykernel and no
configuration, installs nothing and leaves nothing behind."""

    def run(self) -> int:
        if importlib.util.find_spec("ipykernel") is None:
            raise GPError(f"ipykernel, the kernel to be shown, is missing: {sys.executable} -m pip install ipykernel")
        quiet = self.args.json or not sys.stderr.isatty()
        with _apart(), console(stderr=True).status("...") if not quiet else contextlib.nullcontext() as spinner:
            tell = (lambda text: None) if spinner is None else spinner.update
            gp, local = asyncio.run(_both(tell))
        if self.args.json:
            self.print_json({**asdict(gp), "local": asdict(local)})
            return 0
        say("The same kernel, started through gp on this machine and as a plain local one:\n")
        show(("", "THROUGH GP", "LOCAL"), _rows(gp, local), right=("THROUGH GP", "LOCAL"))
        say(
            "\nThrough gp means: a launcher beside the kernel, which calls back over TLS, as on any backend. "
            "The restart took place inside the launcher, which went on running."
        )
        return 0


@dataclass(frozen=True)
class Times:
    """What one kernel did, and how long each step took."""

    ready_seconds: float
    result: str
    interrupt_seconds: float
    restart_seconds: float
    death_seen_seconds: float


def _rows(gp: Times, local: Times) -> list[tuple[str, str, str]]:
    steps = (
        ("start until ready", "ready_seconds"),
        (f"the cell {CELL} gives", "result"),
        ("interrupt of an endless loop", "interrupt_seconds"),
        ("restart until ready", "restart_seconds"),
        ("kill -9 of the kernel until it is known", "death_seen_seconds"),
    )
    return [(text, _shown(getattr(gp, name)), _shown(getattr(local, name))) for text, name in steps]


def _shown(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1000:.1f} ms"


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Keep the demo apart from this installation: folders, records, key and options of its own."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="gp-demo-", ignore_cleanup_errors=True) as folder:
        for name in before:
            if name.startswith(("GP_", "KERNEL_")) and name != "GP_DISABLED_PLUGINS":
                del os.environ[name]
        os.environ |= {
            "GP_DATA_DIR": str(Path(folder, "gp")),
            "GP_RUNTIME_DIR": str(Path(folder, "far")),
            "GP_BIND_IP": "127.0.0.1",
            "GP_RESPONSE_PORT": "0",
            "JUPYTER_RUNTIME_DIR": str(Path(folder, "runtime")),
            "IPYTHONDIR": str(Path(folder, "ipython")),
        }
        for name in ("gp", "far", "runtime", "ipython"):
            Path(folder, name).mkdir(mode=0o700)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


class _Specs(KernelSpecManager):
    """Two kernelspecs that lie nowhere: the same command, with and without the stanza."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        metadata = {"gp": {"kernel_provisioner": {"provisioner_name": "gp-local-provisioner"}}, "local": {}}
        if kernel_name not in metadata:
            raise NoSuchKernel(kernel_name)
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, language="python", display_name=kernel_name, metadata=metadata[kernel_name])


async def _both(tell: Callable[[str], None]) -> tuple[Times, Times]:
    tell("Reading Python's files once, so that both kernels find them in memory")
    async with _started("local"):
        pass
    await runtime().call(kernel_server(Config()).open())  # once for all kernels of a server
    tell("A kernel through gp")
    gp = await _life("gp", in_place=True)
    tell("A plain local kernel")
    return gp, await _life("local")


@contextlib.asynccontextmanager
async def _started(name: str) -> AsyncIterator[tuple[AsyncKernelManager, AsyncKernelClient]]:
    """Yield a kernel that is ready, and remove it."""
    specs = _Specs()
    manager = AsyncKernelManager(kernel_name=name, kernel_spec_manager=specs, config=Config(), shutdown_wait_time=5)
    try:
        # a plain local kernel writes its warnings to our terminal otherwise
        await manager.start_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        client = manager.client()
        client.start_channels()
        try:
            await client.wait_for_ready(timeout=PATIENCE)
            yield manager, client
        finally:
            client.stop_channels()
    finally:
        if manager.has_kernel:
            await manager.shutdown_kernel(now=True)


async def _life(name: str, *, in_place: bool = False) -> Times:
    """Lead one kernel through its life.

    Args:
        name: Of the kernelspec.
        in_place: A restart must keep the launcher.

    Raises:
        GPError: A step went wrong.
    """
    began = time.perf_counter()
    async with _started(name) as (manager, client):
        ready = time.perf_counter() - began
        result = await _run(client, CELL)
        interrupt = await _interrupt(manager, client)
        launcher = await _run(client, PARENT)
        began = time.perf_counter()
        await manager.restart_kernel()
        await client.wait_for_ready(timeout=PATIENCE)
        restart = time.perf_counter() - began
        if in_place and await _run(client, PARENT) != launcher:
            raise GPError("the kernel was restarted, but not inside its launcher")
        death = await _kill(manager, int(await _run(client, "__import__('os').getpid()")))
    return Times(round(ready, 4), result, round(interrupt, 4), round(restart, 4), round(death, 4))


async def _run(client: AsyncKernelClient, code: str) -> str:
    """Run a cell that is one expression, and return its result as it would be shown."""
    shown: list[str] = []

    def hear(message: dict[str, Any]) -> None:
        if message["msg_type"] == "execute_result":
            shown.append(message["content"]["data"]["text/plain"])

    reply = await client.execute_interactive(code, output_hook=hear, timeout=PATIENCE)
    if reply["content"]["status"] != "ok" or not shown:
        raise GPError(f"the cell {code} has failed: {reply['content'].get('evalue', 'no result')}")
    return shown[0]


async def _interrupt(manager: AsyncKernelManager, client: AsyncKernelClient) -> float:
    request = client.execute(LOOP, stop_on_error=False)  # else cells that follow at once are aborted
    begun = ("execute_input", request)
    await _until(client.get_iopub_msg, lambda m: (m["msg_type"], m["parent_header"].get("msg_id")) == begun)
    await asyncio.sleep(0.2)  # the loop itself runs by now
    began = time.perf_counter()
    await manager.interrupt_kernel()
    reply = await _until(client.get_shell_msg, lambda m: m["parent_header"].get("msg_id") == request)
    if reply["content"].get("ename") != "KeyboardInterrupt":
        raise GPError(f"the endless loop did not end by the interrupt, but by {reply['content']}")
    return time.perf_counter() - began


async def _kill(manager: AsyncKernelManager, pid: int) -> float:
    began = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    while await manager.is_alive():
        if time.perf_counter() - began > PATIENCE:
            raise GPError("the death of the kernel was not seen")
        await asyncio.sleep(0.001)
    return time.perf_counter() - began


async def _until(receive: Callable[..., Awaitable[Any]], wanted: Callable[[Any], bool]) -> Any:
    while True:
        message = await receive(timeout=PATIENCE)
        if wanted(message):
            return message
