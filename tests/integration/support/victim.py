"""A server to be killed: starts one tiny kernel and says what happens, one JSON object a line.

Arguments: kernelspec name; seconds of the orphan timeout of pings and silence are scaled down. At a stage named by
``DIE_AT`` it kills itself as ``kill -9`` would.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

from jupyter_client.manager import AsyncKernelManager

from gp_core import kernel, rendezvous, starting, store
from gp_core.local import LocalBackend
from gp_core.plugins import Plugins
from gp_core.server import kernel_server

kernel.PING = kernel.RELAY_PING = 0.2
rendezvous.SWEEP = 0.1


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def die_at(stage: str) -> None:
    """Arrange for this process's death before or after a step of the start."""
    moment, _, step = stage.partition(" ")
    owner, name = {
        "record": (store.FileStore, "put"),
        "plugins": (Plugins, "before_launch"),
        "launch": (LocalBackend, "launch"),
        "confirm": (starting.Start, "_confirm"),
        "connected": (kernel.RemoteKernel, "connected"),
    }[step]
    original = getattr(owner, name)

    def dead() -> None:
        say(died=stage)
        os.kill(os.getpid(), signal.SIGKILL)

    def plain(*args: Any, **kwargs: Any) -> Any:
        if moment == "before":
            dead()
        original(*args, **kwargs)
        return dead()

    async def awaited(*args: Any, **kwargs: Any) -> Any:
        if moment == "before":
            dead()
        await original(*args, **kwargs)
        return dead()

    setattr(owner, name, awaited if asyncio.iscoroutinefunction(original) else plain)


async def main() -> None:
    if stage := os.environ.get("DIE_AT"):
        die_at(stage)
    km = AsyncKernelManager(kernel_name=sys.argv[1])
    await km.start_kernel()
    server = kernel_server()
    say(kernel_id=km.kernel_id, port=server.port, launcher=km.provisioner._kernel.record.handle["pid"])
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := (await reader.readline()).decode().strip():
        if line == "alive":
            say(alive=await km.is_alive())
        elif line == "connected":
            say(connected=km.provisioner._kernel.session is not None, kernels=sorted(server.kernels))
        elif line == "shutdown":
            await km.shutdown_kernel(now=True)
            say(done=True)


asyncio.run(main())
