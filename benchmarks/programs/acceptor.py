"""A server that launchers attach to: ours, with kernels that exist in its books only, or a bare one of asyncio's."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from lines import serve

from gp_core import protocol
from gp_core.identity import Identity
from gp_launchers import wire

BARE = sys.argv[1:] == ["bare"]


class Bare(asyncio.Protocol):
    """The least that can be called an accepted TLS connection: it sends one message, and that only to be counted."""

    answer = wire.pack_message(protocol.accepted(orphan_timeout=600, linger=60, ping=30))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self.answer)
        held.add(transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        held.discard(self._transport)


held: set[asyncio.Transport] = set()


async def listen_bare(count: int, known: bool) -> dict[str, Any]:
    """Open the listener; who may come is not asked."""
    identity = Identity.load(Path(os.environ["GP_DATA_DIR"]))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Bare, "127.0.0.1", 0, ssl=identity.context(), backlog=1024)
    return {"port": server.sockets[0].getsockname()[1]}


async def listen_ours(count: int, known: bool) -> dict[str, Any]:
    """Open the listener of a server that has started some kernels; number N has the id kernel-N and the token token-N.

    Args:
        count: How many.
        known: Their launchers have called before, so this is a redial; else it is their first call, which is written
            to the kernel's record.
    """
    from gp_core.kernel import RemoteKernel
    from gp_core.local import LocalBackend
    from gp_core.runtime import runtime
    from gp_core.server import kernel_server
    from gp_core.store import Record

    server = kernel_server()
    await runtime().call(server.open())

    async def register() -> None:
        backend = LocalBackend()
        for number in range(count):
            record = Record(kernel_id=f"kernel-{number}", kernel_name="python3", user="somebody", backend="local")
            record.token = protocol.digest(f"token-{number}")
            record.secret = protocol.digest(f"secret-{number}") if known else None
            record.handle, record.owner, record.state = {"pid": 0}, server.owner, "running"
            record.connection = dict.fromkeys(protocol.PORTS, 0) | {"transport": "tcp", "ip": "127.0.0.1"}
            server.kernels[record.kernel_id] = RemoteKernel(server, backend, record)

    await runtime().call(register())
    return {"port": server.port}


async def usage() -> dict[str, float]:
    """CPU seconds of this process so far, and its resident memory in KiB."""
    gc.collect()
    times = resource.getrusage(resource.RUSAGE_SELF)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"cpu": times.ru_utime + times.ru_stime, "rss": pages * resource.getpagesize() / 1024}


async def profile(seconds: float) -> str:
    """Where the time of the runtime's thread goes; for people who look for it."""
    import cProfile
    import io
    import pstats

    from gp_core.runtime import runtime

    found = io.StringIO()

    async def record() -> None:
        profiler = cProfile.Profile(time.thread_time)
        profiler.enable()
        await asyncio.sleep(seconds)
        profiler.disable()
        pstats.Stats(profiler, stream=found).sort_stats("tottime").print_stats(40)

    await runtime().call(record())
    return found.getvalue()


asyncio.run(serve({"listen": listen_bare if BARE else listen_ours, "usage": usage, "profile": profile}))
