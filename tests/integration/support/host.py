"""A host application to be killed: many kernels by a MappingKernelManager, driven by lines, one JSON answer a line.

Argument: name of the manager's class in `jupyter_server`. Lines: ``start KERNEL_ID KERNELSPEC [USER]``,
``shutdown KERNEL_ID``, ``relay KERNEL_ID``.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from jupyter_core.paths import jupyter_runtime_dir
from jupyter_server.services.kernels import kernelmanager

from gp_core.server import kernel_server


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


async def main() -> None:
    manager = getattr(kernelmanager, sys.argv[1])(connection_dir=jupyter_runtime_dir())
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    say(pid=os.getpid())
    while words := (await reader.readline()).decode().split():
        try:
            if words[0] == "start":
                env = {**os.environ, **({"KERNEL_USERNAME": words[3]} if len(words) > 3 else {})}
                await manager.start_kernel(kernel_id=words[1], kernel_name=words[2], env=env)
                info = manager.get_kernel(words[1]).get_connection_info()
                say(connection={**info, "key": info["key"].decode()})
            elif words[0] == "relay":
                kernel = kernel_server().kernels[words[1]]
                say(
                    resumes=kernel.relay.resumes,
                    streams=len(kernel.relay.streams),
                    launcher=kernel.record.handle["pid"],
                )
            else:
                await manager.shutdown_kernel(words[1], now=True)
                say(done=True)
        except Exception as error:
            say(error=type(error).__name__, text=str(error))


asyncio.run(main())
