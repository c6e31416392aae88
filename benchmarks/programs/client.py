"""A client of kernels that measures the way to them; it does not know what carries its bytes."""

from __future__ import annotations

import asyncio
import socket
import statistics
import time
from typing import Any

import zmq
from lines import serve

PATIENCE = 60_000  # milliseconds
SETTLED = 0.3  # seconds in which a subscription has arrived everywhere

context: zmq.Context[Any] = zmq.Context()
clients: dict[str, dict[str, zmq.Socket[Any]]] = {}
held: list[socket.socket] = []


def _received(channel: zmq.Socket[Any]) -> Any:
    if not channel.poll(PATIENCE):
        raise TimeoutError("no answer")
    return channel.recv_multipart(copy=False)[-1]


async def connect(who: str, ports: dict[str, int]) -> None:
    """Connect to the channels of a blast kernel (`blast_kernel.py`) on this machine."""
    made = clients[who] = {}
    for name, kind in (("shell", zmq.DEALER), ("iopub", zmq.SUB), ("hb", zmq.REQ)):
        made[name] = context.socket(kind)
        made[name].linger = 0
        made[name].connect(f"tcp://127.0.0.1:{ports[name]}")
    made["iopub"].subscribe(who.encode())  # the same kernel may be reached by several ways
    time.sleep(SETTLED)
    _get(who, 1, "shell")
    _get(who, 1, "iopub")
    _echo(who)


def _get(who: str, size: int, channel: str) -> float:
    began = time.perf_counter()
    clients[who]["shell"].send_multipart([b"get", b"%d" % size, channel.encode(), who.encode()])
    found = _received(clients[who][channel])
    seconds = time.perf_counter() - began
    if len(found) != size:
        raise ValueError(f"{len(found)} bytes instead of {size}")
    return seconds


async def get(who: str, size: int, channel: str) -> float:
    """Seconds from a request until a message of some size has come."""
    return _get(who, size, channel)


async def put(who: str, size: int) -> float:
    """Seconds until the kernel has counted a message of some size."""
    data = bytes(size)
    began = time.perf_counter()
    clients[who]["shell"].send_multipart([b"put", data], copy=False)
    answer = _received(clients[who]["shell"])
    seconds = time.perf_counter() - began
    if answer.bytes != b"%d" % size:
        raise ValueError(f"{answer.bytes!r} bytes arrived instead of {size}")
    return seconds


def _echo(who: str) -> float:
    began = time.perf_counter()
    clients[who]["hb"].send(b"ping")
    _received(clients[who]["hb"])
    return time.perf_counter() - began


async def echo(who: str, count: int, pause: float) -> float:
    """Median seconds of some heartbeats, with pauses as idle clients make them."""
    found = []
    for _ in range(count):
        time.sleep(pause)
        found.append(_echo(who))
    return statistics.median(found)


async def load(who: str, size: int, rate: float, seconds: float) -> float:
    """Fetch messages of some size, at most so many bytes a second; bytes a second that came."""
    began = time.perf_counter()
    total = 0
    while (passed := time.perf_counter() - began) < seconds:
        early = total / rate - passed
        if early > 0:
            time.sleep(early)
        _get(who, size, "shell")
        total += size
    return total / passed


async def hold(ports: list[int]) -> None:
    """Open connections that say nothing."""
    for port in ports:
        held.append(socket.create_connection(("127.0.0.1", port)))


async def leave(who: str) -> None:
    """Close the connections of a client."""
    for one in clients.pop(who).values():
        one.close()


asyncio.run(serve({function.__name__: function for function in (connect, get, put, echo, load, hold, leave)}))
