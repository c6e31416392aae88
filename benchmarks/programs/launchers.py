"""Many simulated launchers in one process: dial, shake hands, say hello, then keep silent but for their pings.

One epoll loop over `ssl` sockets, as the real launcher has; they cost as little as Python allows, because on a small
machine what they take is missing on the server's side.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import random
import select
import socket
import ssl
import threading
import time
from typing import Any

from lines import serve

from gp_launchers import wire

PING = 30.0
PIN = json.dumps({"type": "ping", "n": 1}).encode()


def hello(number: int) -> bytes:
    return wire.pack_message(
        {
            "type": "hello",
            "versions": [wire.VERSION],
            "kernel_id": f"kernel-{number}",
            "token": f"token-{number}",
            "secret": f"secret-{number}",
            "launcher": "0.1.0",
            "python": "3.11.7",
            "host": "simulated",
            "pid": 1 + number,
            "capabilities": ["restart", "signal"],
            "run": 1,
        }
    )


class Crowd:
    """The launchers of this process; lives on a thread of its own."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.shaking: dict[int, tuple[ssl.SSLSocket, int]] = {}
        self.waiting: dict[int, ssl.SSLSocket] = {}
        self.accepted: dict[int, ssl.SSLSocket] = {}
        self.pings: list[tuple[float, int]] = []
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.check_hostname = False
        self.context.verify_mode = ssl.CERT_NONE
        self.failed = 0
        self.greets = True
        self.target = ("127.0.0.1", 0)

    def attach(self, first: int, count: int, at_a_time: int) -> dict[str, float]:
        """Attach some launchers; returns when the first dialled and when the last was accepted."""
        began = time.clock_gettime(time.CLOCK_MONOTONIC)
        numbers = iter(range(first, first + count))
        goal = len(self.accepted) + count
        while len(self.accepted) + self.failed < goal:
            while len(self.shaking) + len(self.waiting) < at_a_time:
                number = next(numbers, None)
                if number is None:
                    break
                self.dial(number)
            self.turn(1.0)
        return {"began": began, "ended": time.clock_gettime(time.CLOCK_MONOTONIC), "failed": self.failed}

    def dial(self, number: int) -> None:
        plain = socket.create_connection(self.target)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.setblocking(False)
        tls = self.context.wrap_socket(plain, do_handshake_on_connect=False)
        self.shaking[tls.fileno()] = tls, number
        self.epoll.register(tls.fileno(), select.EPOLLIN)
        self.shake(tls.fileno())

    def shake(self, descriptor: int) -> None:
        tls, number = self.shaking[descriptor]
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            return
        del self.shaking[descriptor]
        self.waiting[descriptor] = tls
        if self.greets:
            tls.send(hello(number))
        self.heard(descriptor)

    def heard(self, descriptor: int) -> None:
        tls = self.waiting[descriptor]
        try:
            data = tls.recv(65536)
        except ssl.SSLWantReadError:
            return
        del self.waiting[descriptor]
        if b'"accepted"' not in data:
            self.failed += 1
            self.epoll.unregister(descriptor)
            tls.close()
            return
        self.accepted[descriptor] = tls
        heapq.heappush(self.pings, (time.monotonic() + random.uniform(0, PING), descriptor))

    def turn(self, timeout: float) -> None:
        for descriptor, _ in self.epoll.poll(timeout):
            try:
                if descriptor in self.shaking:
                    self.shake(descriptor)
                elif descriptor in self.waiting:
                    self.heard(descriptor)
                elif not self.accepted[descriptor].recv(65536):
                    raise OSError("closed")
            except ssl.SSLWantReadError:
                pass
            except OSError:
                self.failed += 1
                for sessions in (self.shaking, self.waiting, self.accepted):
                    sessions.pop(descriptor, None)
                self.epoll.unregister(descriptor)

    def hold(self, stop: threading.Event) -> None:
        """Keep the sessions alive: each pings every 30 s, as a real one does."""
        ping = wire.pack(wire.MESSAGE, 0, PIN)
        while not stop.is_set():
            self.turn(0.05)
            now = time.monotonic()
            while self.pings and self.pings[0][0] < now and self.greets:
                _, descriptor = heapq.heappop(self.pings)
                if descriptor in self.accepted:
                    self.accepted[descriptor].send(ping)
                    heapq.heappush(self.pings, (now + PING, descriptor))


crowd = Crowd()
holding: list[tuple[threading.Thread, threading.Event]] = []


async def aim(port: int, greets: bool) -> None:
    """Say where to attach to, and whether with a hello."""
    crowd.target, crowd.greets = ("127.0.0.1", port), greets


async def attach(first: int, count: int, at_a_time: int) -> dict[str, float]:
    return await asyncio.to_thread(crowd.attach, first, count, at_a_time)


async def hold() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=crowd.hold, args=(stop,), daemon=True)
    thread.start()
    holding.append((thread, stop))


async def report() -> dict[str, Any]:
    """End holding and say how many sessions there still are."""
    while holding:
        thread, stop = holding.pop()
        stop.set()
        thread.join()
    return {"sessions": len(crowd.accepted), "failed": crowd.failed}


asyncio.run(serve({"aim": aim, "attach": attach, "hold": hold, "report": report}))
