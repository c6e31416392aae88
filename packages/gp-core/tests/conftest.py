"""Every test gets an installation of its own: data folder, listener, plugins."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

from gp_core import local, plugins, server, testing
from gp_core._markers import hookimpl
from gp_core.events import KernelEvent
from gp_core.runtime import runtime


@pytest.fixture(autouse=True)
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh data folder and a server that is closed at the end; yields the folder."""
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("GP_DATA_DIR", str(tmp_path / "gp"))
    monkeypatch.setenv("GP_RESPONSE_PORT", "0")
    monkeypatch.setattr(server, "_server", None)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [])  # whatever else is installed
    plugins.plugins.cache_clear()
    yield tmp_path / "gp"
    if server._server is not None:
        asyncio.run(runtime().call(_close(server._server[1])))
    plugins.plugins.cache_clear()


async def _close(used: server.KernelServer) -> None:
    left = list(used.kernels.values())
    await asyncio.gather(*(kernel.remove(force=True) for kernel in left))
    if used.rendezvous is not None:
        used.rendezvous.close()
        await asyncio.sleep(0.02)
    runtime().at_exit.clear()
    assert not left, f"the test left kernels running: {[kernel.info.kernel_id for kernel in left]}"


TINY = Path(testing.__file__).with_name("tiny_kernel.py")


class Specs(KernelSpecManager):
    """One kernelspec, in memory."""

    def __init__(self, spec: KernelSpec) -> None:
        super().__init__()
        self.spec = spec

    def get_kernel_spec(self, name: str) -> KernelSpec:
        return self.spec


def kernelspec(*argv: str, config: dict[str, Any] | None = None, **more: Any) -> KernelSpec:
    """A kernelspec with only our stanza; without argv it is the tiny kernel's."""
    stanza = {"provisioner_name": "gp-local-provisioner", "config": config or {}}
    metadata = {"kernel_provisioner": stanza, **more.pop("metadata", {})}
    command = list(argv) or ["python3", str(TINY), "{connection_file}", "serve"]
    return KernelSpec(argv=command, display_name="tiny", language="python", metadata=metadata, **more)


@pytest.fixture
def manager() -> Callable[..., AsyncKernelManager]:
    """Make an AsyncKernelManager of a kernelspec; see `kernelspec`."""

    def make(*argv: str, spec: KernelSpec | None = None, **more: Any) -> AsyncKernelManager:
        specs = Specs(spec or kernelspec(*argv, **more))
        return AsyncKernelManager(kernel_name="tiny", kernel_spec_manager=specs)

    return make


@pytest.fixture
async def started(manager: Callable[..., AsyncKernelManager]) -> AsyncIterator[AsyncKernelManager]:
    """A tiny kernel that runs."""
    km = manager()
    await km.start_kernel()
    yield km
    if km.has_kernel:
        await km.shutdown_kernel(now=True)
    else:
        await km.cleanup_resources()


@pytest.fixture
def events(installation: Path) -> list[str]:
    """The names of all events that plugins hear."""
    heard: list[str] = []

    class Listener:
        @hookimpl
        async def gp_kernel_event(self, event: KernelEvent) -> None:
            heard.append(event.event.value)

    plugins.plugins().register(Listener(), "listener")
    return heard


def ask(km: AsyncKernelManager) -> dict[str, Any]:
    """What the tiny kernel sees of itself."""
    with socket.create_connection((km.ip, km.shell_port), timeout=5) as peer:
        peer.sendall(b"?\n")
        seen: dict[str, Any] = json.loads(peer.makefile().read())
        return seen


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Wait for a condition, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


def launchers() -> list[psutil.Process]:
    """The launchers of this installation that run."""
    found = []
    for handle in local._launchers(None):
        with contextlib.suppress(psutil.NoSuchProcess):  # gone between the two looks
            found.append(psutil.Process(handle["pid"]))
    return found


async def nothing_left(folder: Path) -> None:
    """Fail if a launcher or a record stays."""
    await until(lambda: not launchers() and not list((folder / "kernels").glob("*")), 20.0)
