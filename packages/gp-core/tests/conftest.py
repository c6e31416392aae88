"""Every test gets an installation of its own: data folder, listener, plugins."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from gp_core import plugins, server
from gp_core.runtime import runtime


@pytest.fixture(autouse=True)
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh data folder and a server that is closed at the end; yields the folder."""
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("GP_DATA_DIR", str(tmp_path / "gp"))
    monkeypatch.setenv("GP_RESPONSE_PORT", "0")
    monkeypatch.setattr(server, "_server", None)
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
        await asyncio.sleep(0.01)
    runtime().at_exit.clear()
    assert not left, f"the test left kernels running: {[kernel.info.kernel_id for kernel in left]}"
