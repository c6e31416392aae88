"""Kernels on the far side of a `Link`, for tests: a backend as anybody writes one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from typing import Any

import psutil
from jupyter_client.provisioning.factory import KernelProvisionerFactory
from traitlets import Unicode

import gp_core as gp
from clusters.wan.link import Link
from gp_core import local
from gp_core.plugins import plugins

PROVISIONER = "gp-far-provisioner"

# Many breaks in a short time are the test's business: the pauses between attempts must not grow meanwhile.
_START = """\
import sys; sys.path.insert(0, {launcher!r})
from gp_launchers import dialer; dialer.LONGEST_PAUSE = 0.2
from gp_launchers.__main__ import main; sys.exit(main())
"""


class FarBackend(local.LocalBackend):
    """Launchers and kernels as processes of another network."""

    name = "far"
    runs_here = False
    namespace = Unicode(help="Path of their network namespace.").tag(config=True)

    async def launch(self, request: gp.LaunchRequest) -> gp.Handle:
        code = _START.format(launcher=str(request.launcher_file))
        launcher = [sys.executable, "-I", "-S", "-c", code, *request.launcher_arguments()]
        argv = ["nsenter", f"--net={self.namespace}", *launcher, "--", *request.argv]
        log = self._log_file(request.kernel_id)
        here = {name: value for name, value in os.environ.items() if not name.startswith("GP_")}
        pid = local._spawn(argv, {**here, **request.secrets}, log)
        started = psutil.Process(pid).create_time()
        return {"kernel_id": request.kernel_id, "pid": pid, "started": started, "log": str(log)}


class FarProvisioner(gp.RemoteProvisioner):
    """Starts them."""

    backend_name = FarBackend.name


class Listener:
    """Offers the backend, and keeps what happens to kernels.

    Args:
        events: Names of events and their details, in order.
    """

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    @gp.hookimpl
    def gp_backends(self) -> Iterable[type[gp.Backend]]:
        """Offer the backend."""
        return [FarBackend]

    @gp.hookimpl
    async def gp_kernel_event(self, kernel: gp.KernelInfo, event: gp.KernelEvent) -> None:
        """Keep an event."""
        self.events.append((event.event.value, dict(event.data)))

    def count(self, event: str) -> int:
        """How often an event has happened."""
        return sum(name == event for name, _ in self.events)


@contextmanager
def offered() -> Iterator[Listener]:
    """Install the backend as a package would, until the end of the block."""
    listener = Listener()
    factory = KernelProvisionerFactory.instance()
    entry = EntryPoint(PROVISIONER, f"{__name__}:{FarProvisioner.__name__}", factory.GROUP_NAME)
    plugins.cache_clear()
    plugins().register(listener, "far")
    factory.provisioners[PROVISIONER] = entry
    try:
        yield listener
    finally:
        del factory.provisioners[PROVISIONER]
        plugins.cache_clear()


def config(link: Link) -> dict[str, Any]:
    """Config of a kernelspec for kernels on the far side of a link."""
    return {"namespace": link.namespace, "channels": "relay", "launch_timeout": 60}
