"""A host application as jupyter_server is one: starts kernels through jupyter_client, on one event loop.

The same program for all contestants; which provisioner is used is the kernelspec's business.
"""

from __future__ import annotations

import asyncio
import os
import platform
import signal
import socket
import statistics
import time
from importlib.metadata import EntryPoint, distributions
from typing import Any

from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import KernelProvisionerFactory
from lines import serve
from ticker import Ticker

PATIENCE = 60.0  # seconds
UNSEEN = 10.0  # seconds after which a death is taken for never seen

managers: dict[str, AsyncKernelManager] = {}
clients: dict[str, Any] = {}
tickers: list[Ticker] = []


def clock() -> float:
    return time.perf_counter()


async def start(kernel: str, slot: str = "") -> float:
    """Seconds from the call of start_kernel until the kernel answers (ipykernel) or its ports accept."""
    manager = managers[slot] = AsyncKernelManager(kernel_name=kernel)
    began = clock()
    await manager.start_kernel()
    await (_answered(slot) if kernel.startswith("ipykernel") else _accepts(manager))
    return clock() - began


async def phases(kernel: str, slot: str = "") -> list[float]:
    """Seconds from the call of start_kernel until it has returned, and until the kernel answers."""
    manager = managers[slot] = AsyncKernelManager(kernel_name=kernel)
    began = clock()
    await manager.start_kernel()
    returned = clock() - began
    await _answered(slot)
    return [returned, clock() - began]


async def _answered(slot: str) -> None:
    """Connect a new client and wait for the reply to its first request."""
    if slot in clients:
        clients.pop(slot).stop_channels()
    client = clients[slot] = managers[slot].client()
    client.start_channels(hb=False)
    request = client.kernel_info()
    while (await client.get_shell_msg(timeout=PATIENCE))["parent_header"].get("msg_id") != request:
        pass


async def _accepts(manager: AsyncKernelManager) -> None:
    for port in (manager.shell_port, manager.iopub_port, manager.control_port):
        while not _connects(manager.ip, port):
            await asyncio.sleep(0.001)


def _connects(ip: str, port: int) -> bool:
    """Connect to this machine: that never waits, and costs the loop next to nothing."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1" if ip in ("0.0.0.0", "*", "") else ip, port)) == 0


async def ports(slot: str = "") -> dict[str, int]:
    """The ports that a client is told."""
    names = ("shell", "iopub", "stdin", "control", "hb")
    return {name: getattr(managers[slot], f"{name}_port") for name in names}


async def execute(slot: str = "", count: int = 1) -> float:
    """Median seconds from an `execute_request` of 1+1 until its reply and the kernel's idle state have come."""
    client, found = clients[slot], []
    for _ in range(count):
        began = clock()
        request = client.execute("1+1")
        while (await client.get_shell_msg(timeout=PATIENCE))["parent_header"].get("msg_id") != request:
            pass
        while True:
            message = await client.get_iopub_msg(timeout=PATIENCE)
            if (
                message["parent_header"].get("msg_id") == request
                and message["content"].get("execution_state") == "idle"
            ):
                break
        found.append(clock() - began)
    return statistics.median(found)


async def watch() -> None:
    """Begin to notice how late this loop is; `noticed` ends it."""
    tickers.append(Ticker())


async def cpu() -> float:
    """CPU seconds of this process so far."""
    return time.process_time()


async def restart(now: bool, slot: str = "") -> float:
    """Seconds from the call of restart_kernel until the new kernel answers."""
    began = clock()
    await managers[slot].restart_kernel(now=now)
    await _answered(slot)
    return clock() - began


async def interrupt(slot: str = "") -> float:
    """Seconds from the call of interrupt_kernel until the execute_reply of an endless loop."""
    client = clients[slot]
    request = client.execute("while True: pass")
    while True:
        message = await client.get_iopub_msg(timeout=PATIENCE)
        if message["msg_type"] == "execute_input" and message["parent_header"]["msg_id"] == request:
            break
    await asyncio.sleep(0.2)  # now it is in the loop
    began = clock()
    await managers[slot].interrupt_kernel()
    while (await client.get_shell_msg(timeout=PATIENCE))["parent_header"]["msg_id"] != request:
        pass
    return clock() - began


async def death(slot: str = "") -> float:
    """Seconds from kill -9 of the kernel's process until poll() says so, asked every millisecond."""
    manager, client = managers[slot], clients[slot]
    request = client.execute("", user_expressions={"pid": "__import__('os').getpid()"})
    while (reply := await client.get_shell_msg(timeout=PATIENCE))["parent_header"]["msg_id"] != request:
        pass
    pid = int(reply["content"]["user_expressions"]["pid"]["data"]["text/plain"])
    began = clock()
    os.kill(pid, signal.SIGKILL)
    while await manager.provisioner.poll() is None:
        if clock() - began > UNSEEN:
            raise TimeoutError(f"poll() still says alive {UNSEEN:g} s after kill -9")
        await asyncio.sleep(0.001)
    return clock() - began


async def gone(slot: str = "") -> float:
    """When poll() says that the kernel is dead, asked every millisecond, by `clock`."""
    began = clock()
    while await managers[slot].provisioner.poll() is None:
        if clock() - began > UNSEEN:
            raise TimeoutError(f"poll() still says alive after {UNSEEN:g} s")
        await asyncio.sleep(0.001)
    return clock()


async def shutdown(slot: str = "", now: bool = False) -> float:
    """Seconds of shutdown_kernel."""
    if slot in clients:
        clients.pop(slot).stop_channels()
    manager = managers.pop(slot)
    began = clock()
    await manager.shutdown_kernel(now=now)
    return clock() - began


async def stillborn() -> dict[str, Any]:
    """Start a kernel that dies at once: seconds until anything says so, and what."""
    manager = AsyncKernelManager(kernel_name="stillborn")
    began = clock()
    try:
        await manager.start_kernel()
        client = manager.client()
        client.start_channels()
        try:
            await client.wait_for_ready(timeout=PATIENCE)
        finally:
            client.stop_channels()
    except Exception as error:
        after = clock() - began
        await _removed(manager)
        return {"seconds": after, "error": str(error)}
    raise AssertionError("it lives")


async def _removed(manager: AsyncKernelManager) -> None:
    try:
        await asyncio.wait_for(manager.shutdown_kernel(now=True), PATIENCE)
    except Exception as error:
        print(f"shutdown: {error!r}", flush=True)


async def crowd(count: int, kernel: str = "instant", more: bool = False) -> dict[str, Any]:
    """Start kernels, all at the same time; seconds until all are ready, and how late this loop was.

    Args:
        count: How many.
        kernel: Of which kind.
        more: Besides those of the crowds before.
    """
    first = len(managers) if more else 0
    made = {f"crowd-{first + number}": AsyncKernelManager(kernel_name=kernel) for number in range(count)}
    managers.update(made)

    async def one(slot: str, manager: AsyncKernelManager) -> None:
        await manager.start_kernel()
        await (_answered(slot) if kernel.startswith("ipykernel") else _accepts(manager))

    await asyncio.sleep(0.5)
    ticker = Ticker()
    cpu, began = time.process_time(), clock()
    outcomes = await asyncio.gather(*(one(*each) for each in made.items()), return_exceptions=True)
    seconds, cpu = clock() - began, time.process_time() - cpu
    lag = ticker.stop()
    failures = [repr(outcome) for outcome in outcomes if outcome is not None]
    return {"seconds": seconds, "lag": lag, "failures": failures, "cpu": cpu}


async def nothing(count: int) -> None:
    """Start kernels that nobody starts, all at the same time; `noticed` ends it."""
    provisioners = KernelProvisionerFactory.instance().provisioners
    provisioners["null"] = EntryPoint("null", "null_provisioner:NullProvisioner", "jupyter_client.kernel_provisioners")
    for number in range(count):
        managers[f"null-{number}"] = AsyncKernelManager(kernel_name="nothing")
    await asyncio.sleep(0.5)
    tickers.append(Ticker())
    await asyncio.gather(*(managers[f"null-{number}"].start_kernel() for number in range(count)))


async def noticed() -> dict[str, float]:
    """How late the loop was since `nothing` or `watch` began."""
    return tickers.pop().stop()


async def idle(kernels: int, seconds: float, clients_too: bool = True) -> dict[str, Any]:
    """Do nothing with some kernels running: how late this loop is, and what it costs.

    Args:
        kernels: How many.
        seconds: How long.
        clients_too: Their clients stay connected in this process, and send heartbeats.
    """
    for number in range(kernels):
        await start("instant", f"idle-{number}")
    while clients and not clients_too:
        clients.popitem()[1].stop_channels()
    await asyncio.sleep(1)
    ticker = Ticker()
    cpu = time.process_time()
    await asyncio.sleep(seconds)
    return {"lag": ticker.stop(), "cpu": (time.process_time() - cpu) / seconds}


async def forget() -> None:
    """End all kernels."""
    while clients:
        clients.popitem()[1].stop_channels()
    await asyncio.gather(*(_removed(managers.pop(slot)) for slot in list(managers)))


async def abandon() -> None:
    """Let go of all kernels: somebody else ends them."""
    while clients:
        clients.popitem()[1].stop_channels()
    managers.clear()


async def about() -> dict[str, str]:
    """Names and versions of what this process uses."""
    names = ("jupyter_client", "ipykernel", "pyzmq", "tornado", "gateway_provisioners")
    found = {dist.metadata["Name"].replace("-", "_"): dist.version for dist in distributions()}
    text = ", ".join(f"{name} {found[name]}" for name in names if name in found)
    return {"versions": f"{text} on Python {platform.python_version()}"}


async def main() -> None:
    functions = (
        start,
        phases,
        ports,
        execute,
        watch,
        cpu,
        restart,
        interrupt,
        death,
        gone,
        shutdown,
        stillborn,
        crowd,
        nothing,
        noticed,
        idle,
        forget,
        abandon,
        about,
    )
    await serve({function.__name__: function for function in functions})
    await forget()


asyncio.run(main())
