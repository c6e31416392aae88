"""Channels of a launcher that was accepted and breaks every rule: its session ends with a reason, all else goes on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import struct
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import psutil
import pytest
from jupyter_client import AsyncKernelManager

from gp_core import protocol
from gp_core.backend import Backend, Handle, State, Status
from gp_core.kernel import RemoteKernel
from gp_core.protocol import PORTS, Message
from gp_core.runtime import runtime
from gp_core.server import kernel_server
from gp_core.store import Record
from gp_core.testing import FakeLauncher
from gp_launchers.streams import ACK, BASE, CLOSE, CREDIT, DATA, KEPT, OPEN, RETURN, WANT
from gp_launchers.wire import HEADER, Decoder, pack, pack_message

from .conftest import until
from .test_relay import ECHO, connect

Make = Callable[..., AsyncKernelManager]
MANY = 100_000
ROOM = 64 * 1024 * 1024
"""Bytes that this process may grow by: it holds what the tests send, too."""


class Nowhere(Backend):
    """A platform whose one job is the test itself."""

    name = "nowhere"
    ended = False

    async def status(self, handle: Handle) -> Status:
        return Status(state=State.GONE if self.ended else State.RUNNING)

    async def terminate(self, handle: Handle, *, force: bool) -> None:
        self.ended = True


@pytest.fixture
async def neighbour(manager: Make, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AsyncKernelManager]:
    """A kernel of the same server that echoes, and its real launcher."""
    monkeypatch.setenv("GP_CHANNELS", "relay")
    km = manager("python3", "-c", ECHO, "{connection_file}")
    await km.start_kernel()
    yield km
    await km.shutdown_kernel(now=True)


@pytest.fixture
async def victim(neighbour: AsyncKernelManager) -> AsyncIterator[RemoteKernel]:
    """A kernel with endpoints whose launcher has not called yet."""
    record = Record(
        kernel_id="bad",
        kernel_name="x",
        user="eve",
        backend="nowhere",
        token=protocol.digest("token"),
        handle={"job": 1},
        connection={"transport": "tcp", "ip": "127.0.0.1", "key": "", **dict.fromkeys(PORTS, 0)},
    )
    kernel = RemoteKernel(kernel_server(), Nowhere(), record)
    record.connection |= await runtime().call(kernel.open_relay())
    kernel.server.kernels["bad"] = kernel
    yield kernel
    await runtime().call(kernel.remove(force=True))


class Liar(FakeLauncher):
    """Says of the channels what the test wants it to say, and nothing by itself."""

    def agreed(self, relay: Message) -> None:
        pass

    def relayed(self, kind: int, stream: int, payload: bytes) -> None:
        pass


def launcher(kernel: RemoteKernel) -> FakeLauncher:
    """One that knows the token."""
    server = kernel.server
    assert server.identity is not None
    return Liar(kernel_id="bad", address=("127.0.0.1", server.port), pins=server.identity.pins, token="token")


async def accepted(dialing: FakeLauncher, relay: Mapping[str, Any] | None = None) -> Message:
    """Dial as an honest launcher does; returns what it is told of the channels."""
    await dialing.connect()
    answer = await dialing.hello(capabilities=["relay", "restart", "signal"], relay=relay)
    assert answer is not None
    assert answer["type"] == "accepted"
    told: Message = answer["relay"]
    return told


async def client_of(kernel: RemoteKernel) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client that is connected to the shell channel, and is the kernel's next stream."""
    assert kernel.relay is not None
    before = len(kernel.relay.streams)
    pair = await asyncio.open_connection("127.0.0.1", kernel.record.connection["shell_port"])
    await until(lambda: kernel.relay is not None and len(kernel.relay.streams) > before)
    return pair


@contextlib.asynccontextmanager
async def unimpressed(km: AsyncKernelManager) -> AsyncIterator[None]:
    """Let a client of another kernel talk to it all the while; it must be answered, and in time."""
    reader, writer = await connect(km)
    slowest, turns, going = 0.0, 0, True

    async def talk() -> None:
        nonlocal slowest, turns
        while going:
            began = time.monotonic()
            writer.write(b"%d\n" % turns)
            assert await asyncio.wait_for(reader.readline(), 20) == b"%d\n" % turns
            slowest, turns = max(slowest, time.monotonic() - began), turns + 1
            await asyncio.sleep(0.001)

    talking = asyncio.ensure_future(talk())
    try:
        yield
    finally:
        going = False
        await talking
        writer.close()
    print(f"{turns} round trips, the slowest took {1000 * slowest:.0f} ms")
    assert turns


async def ended(dialing: FakeLauncher) -> None:
    """Read what the server still says until it has closed the session."""
    while await asyncio.wait_for(dialing.receive(), 20) is not None:
        pass
    dialing.close()


def number(value: int) -> bytes:
    return struct.pack("!I", value)


def count(value: int) -> bytes:
    return struct.pack("!Q", value)


GARBAGE = random.Random(7).randbytes(1 << 20)

BREACHES = {
    "data without credit": ([pack(DATA, 1, b"x" * BASE)] * 4000, "more than it has credit for"),
    "one frame too large for its credit": ([pack(DATA, 1, b"x" * (BASE + 1))], "more than it has credit for"),
    "a hundred thousand streams": ([pack(OPEN, 2 + n, b"shell") for n in range(MANY)], "must not be opened"),
    "a stream opened again": ([pack(OPEN, 1, b"shell")], "must not be opened"),
    "a stream that was never opened": ([pack(DATA, 77, b"x")], "was never opened"),
    "stream 0": ([pack(CLOSE, 0, b"")], "was never opened"),
    "endless credit": ([pack(CREDIT, 1, number(0xFFFFFFFF))], "more credit than there is"),
    "credit by and by": ([pack(CREDIT, 1, number(64 * 1024))] * 9, "more credit than there is"),
    "returned credit that it never had": ([pack(RETURN, 1, number(1))], "does not have"),
    "the future acknowledged": ([pack(ACK, 0, count(1 << 40))], "are acknowledged, which cannot be"),
    "the past acknowledged": ([pack(ACK, 0, count(1)), pack(ACK, 0, count(0))], "are acknowledged, which cannot be"),
    "half an acknowledgement": ([pack(ACK, 0, b"1234")], "wrong size"),
    "credit without a number": ([pack(CREDIT, 1, b"lot")], "wrong size"),
}

# These say nothing of the channels: their connections wait for the launcher to come back.
FRAMING = {
    "an endless frame": ([HEADER.pack(DATA, 1, 0xFFFFFFFF)], "at most 1048576 are allowed"),
    "no JSON": ([pack(0, 0, b"\xff" * 1000)], "not JSON"),
    "garbage": ([GARBAGE], "Error"),
}


@pytest.mark.parametrize("name", [*BREACHES, *FRAMING])
async def test_a_breach_ends_the_session_with_a_reason_and_nothing_else(
    neighbour: AsyncKernelManager, victim: RemoteKernel, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.INFO)
    frames, reason = {**BREACHES, **FRAMING}[name]
    dialing = launcher(victim)
    first = await accepted(dialing)
    reader, writer = await client_of(victim)
    before = psutil.Process().memory_info().rss
    async with unimpressed(neighbour):
        with contextlib.suppress(OSError):
            for start in range(0, len(frames), 1000):
                await dialing.send(b"".join(frames[start : start + 1000]))
        await ended(dialing)
        await until(lambda: victim.session is None)
    assert psutil.Process().memory_info().rss - before < ROOM
    closed = [record.getMessage() for record in caplog.records if "launcher session of" in record.getMessage()]
    assert len(closed) == 1
    assert reason in closed[0]
    if name in BREACHES:
        await asyncio.wait_for(reader.read(), 10)  # to its end: nothing of it is resumed
    again = launcher(victim)
    again.secret = dialing.secret
    second = await accepted(again, {"id": first["id"], "received": 0})
    assert (second["id"] == first["id"]) == (name in FRAMING)
    if name in FRAMING:
        await again.send(pack(DATA, 1, b"back"))
        assert await asyncio.wait_for(reader.readexactly(4), 5) == b"back"
    _, another = await client_of(victim)
    another.close()
    writer.close()
    again.close()
    assert victim.exit_code is None


async def test_frames_that_are_played_again_end_the_session_when_their_credit_is_used_up(
    neighbour: AsyncKernelManager, victim: RemoteKernel
) -> None:
    """Who resumes with a wrong count, or sends again what has arrived, is a liar about its own kernel only."""
    dialing = launcher(victim)
    told = await accepted(dialing)
    reader, writer = await client_of(victim)
    async with unimpressed(neighbour):
        played = pack(DATA, 1, b"x" * (BASE // 2))
        for _ in range(50):
            await dialing.send(played)
        # a client that reads gets it, as often as it is sent: these bytes are the launcher's own business
        assert await asyncio.wait_for(reader.readexactly(BASE), 5) == b"x" * BASE
        dialing.close()
        await until(lambda: victim.session is None)
        for received in (1 << 40, 1 << 63, 12345):
            again = launcher(victim)
            again.secret = dialing.secret
            await again.connect()
            lie = {"id": told["id"], "received": received}
            answer = await again.hello(capabilities=["relay", "restart", "signal"], relay=lie)
            if answer is not None:  # the lie before has ended what could have been resumed
                assert answer["relay"]["id"] != told["id"]
            again.close()
    writer.close()


async def test_a_launcher_that_never_acknowledges_fills_nothing(
    neighbour: AsyncKernelManager, victim: RemoteKernel, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told of every credit, and what it is told is kept for it: not for ever."""
    caplog.set_level(logging.INFO)
    assert victim.relay is not None
    streams = victim.relay.streams
    dialing = launcher(victim)
    await accepted(dialing)
    reader, writer = await client_of(victim)

    async def take() -> None:
        with contextlib.suppress(OSError):
            while await reader.read(1 << 16):
                pass

    taking = asyncio.ensure_future(take())
    async with unimpressed(neighbour):
        credit, decoder = BASE, Decoder()
        assert dialing._reader is not None
        with contextlib.suppress(OSError):
            while streams._kept_bytes < 3 * KEPT:
                size = min(credit, BASE // 2)
                credit -= size
                await dialing.send(pack(DATA, 1, b"x" * size) * bool(size))
                while credit < BASE // 2:
                    data = await asyncio.wait_for(dialing._reader.read(1 << 16), 10)
                    if not data:
                        raise ConnectionResetError
                    credit += sum(
                        int.from_bytes(payload, "big") for kind, _, payload in decoder.feed(data) if kind == CREDIT
                    )
    assert "does not acknowledge" in caplog.text
    await taking
    writer.close()
    dialing.close()


FLOODS = {
    "wants": pack(WANT, 1, b""),
    "closes": pack(CLOSE, 1, b""),
    "credits of nothing": pack(CREDIT, 1, number(0)),
    "acknowledgements of nothing": pack(ACK, 0, count(0)),
    "frames of a newer version": pack(200, 1, b""),
    "messages of a newer version": pack_message({"type": "novelty"}),
    "pings": pack_message({"type": "ping", "n": 1}),
    "output that was left out": pack_message({"type": "dropped", "messages": 1, "bytes": 1}),
}


@pytest.mark.parametrize("name", FLOODS)
async def test_a_flood_of_what_is_allowed_delays_and_fills_nothing(
    neighbour: AsyncKernelManager, victim: RemoteKernel, name: str
) -> None:
    dialing = launcher(victim)
    await accepted(dialing)
    _, writer = await client_of(victim)
    frame = FLOODS[name]
    before = psutil.Process().memory_info().rss
    assert dialing._writer is not None
    async with unimpressed(neighbour):
        with contextlib.suppress(OSError):
            for _ in range(MANY // 1000):
                await dialing.send(frame * 1000)
                await asyncio.sleep(0)
    assert psutil.Process().memory_info().rss - before < ROOM
    writer.close()
    dialing.close()
