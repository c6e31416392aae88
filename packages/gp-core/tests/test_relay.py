"""Channels through the launcher's session, with real launchers and kernels that echo."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from jupyter_client import AsyncKernelManager

from gp_core import Event, KernelEvent, hookimpl
from gp_core import kernel as kernel_module
from gp_core import relay as relay_module
from gp_core.errors import ConfigError, LaunchFailed
from gp_core.plugins import plugins
from gp_core.relay import Relay, peer_uid
from gp_core.runtime import runtime
from gp_launchers.streams import CHANNELS

from .conftest import ask, launchers, until
from .test_provisioner import PORT_NAMES, cancelled_at, lost, remote

Make = Callable[..., AsyncKernelManager]

ECHO = """
import itertools, json, os, socket, sys, threading
info = json.load(open(sys.argv[1]))

def serve(name, peer, number):
    if name == "iopub_port":
        peer.sendall(("%d\\n" % os.getpid()).encode())
    while True:
        try:
            data = peer.recv(65536)
            if data.startswith(b"keep:"):
                open(data[5:].decode(), "w").close()
            if data == b"which":
                data = str(number).encode()
            if data == b"die":
                peer.sendall(b"w" * 300000)
                os._exit(3)
            peer.sendall(data)
        except OSError:
            return
        if not data:
            return

def accept(name, listener):
    for number in itertools.count():
        threading.Thread(target=serve, args=(name, listener.accept()[0], number)).start()

for name in ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port"):
    if info["transport"] == "ipc":
        s = socket.socket(socket.AF_UNIX)
        s.bind("%s-%d" % (info["ip"], info[name]))
    else:
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((info["ip"], info[name]))
    s.listen(50)
    threading.Thread(target=accept, args=(name, s)).start()
"""


@pytest.fixture(autouse=True)
def relayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GP_CHANNELS", "relay")


@pytest.fixture
async def echo(manager: Make) -> AsyncIterator[AsyncKernelManager]:
    """A kernel that sends back what it gets on each channel, and its pid first on iopub."""
    km = manager("python3", "-c", ECHO, "{connection_file}")
    await km.start_kernel()
    yield km
    await km.shutdown_kernel(now=True)


async def connect(
    km: AsyncKernelManager, port: str = "shell_port"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(km.ip, getattr(km, port), limit=1 << 24)


async def pid_of(km: AsyncKernelManager) -> int:
    """Connect to iopub until a kernel answers."""
    while True:
        reader, writer = await connect(km, "iopub_port")
        told = await asyncio.wait_for(reader.readline(), 10)
        writer.close()
        if told:  # else it was one that has just died, and a client connects again
            return int(told)


async def test_clients_get_endpoints_of_this_machine_and_the_kernel_has_others(
    started: AsyncKernelManager, installation: Path
) -> None:
    info = started.get_connection_info()
    assert (info["transport"], info["ip"]) == ("tcp", "127.0.0.1")
    seen = ask(started)
    told = next(word for word in seen["cmdlines"] if "tiny_kernel" in word and f"{started.kernel_id}-" in word)
    there = Path(next(word for word in told.split() if word.endswith("connection.json"))).read_text()
    assert not any(f'"{name}":{info[name]}' in there.replace(" ", "") for name in PORT_NAMES)
    assert info["key"].decode() in there


async def test_every_byte_arrives_whatever_happens_to_the_connection(
    echo: AsyncKernelManager,
) -> None:
    rng = random.Random(4)
    data = rng.randbytes(6_000_000)
    reader, writer = await connect(echo)

    async def send() -> None:
        for start in range(0, len(data), 50_000):
            writer.write(data[start : start + 50_000])
            await writer.drain()
            await asyncio.sleep(0.005)

    async def cut() -> None:
        for _ in range(12):
            await asyncio.sleep(rng.uniform(0.01, 0.15))
            if remote(echo).session is not None:
                lost(echo)

    sending, cutting = asyncio.ensure_future(send()), asyncio.ensure_future(cut())
    assert await asyncio.wait_for(reader.readexactly(len(data)), 60) == data
    await asyncio.gather(sending, cutting)
    writer.close()
    assert await echo.is_alive()
    held = remote(echo).relay
    assert held is not None
    assert held.resumes >= 2


async def test_a_slow_reader_delays_nobody_and_fills_nothing(echo: AsyncKernelManager) -> None:
    writers = []
    for _ in range(5):
        reader, writer = await asyncio.open_connection(echo.ip, echo.shell_port, limit=1000)
        writer.transport.set_write_buffer_limits(0)
        for _ in range(40):
            writer.write(b"x" * 1_000_000)
        reader._transport.pause_reading()
        writers.append(writer)
    await asyncio.sleep(0.5)
    held = remote(echo).relay
    assert held is not None
    assert sum(stream.queued for stream in held.streams._streams.values()) < 5 * 400_000
    reader, writer = await connect(echo, "control_port")
    writer.write(b"interrupt\n")
    assert await asyncio.wait_for(reader.readline(), 2) == b"interrupt\n"
    for used in (*writers, writer):
        used.transport.abort()


async def test_endpoints_stay_over_restarts_and_new_connections_wait_for_the_new_kernel(
    echo: AsyncKernelManager,
) -> None:
    info, first = echo.get_connection_info(), await pid_of(echo)
    for now in (True, False):
        reader, writer = await connect(echo)
        writer.write(b"old\n")
        assert await asyncio.wait_for(reader.readline(), 10) == b"old\n"
        restarting = asyncio.ensure_future(echo.restart_kernel(now=now))
        assert await asyncio.wait_for(reader.read(), 10) == b"", "the old kernel's connection is closed"
        writer.close()
        second = await pid_of(echo)  # held until the new one listens
        await restarting
        assert second != first
        assert echo.get_connection_info() == info
        first = second


async def test_a_launcher_that_is_gone_is_replaced_behind_the_same_endpoints(echo: AsyncKernelManager) -> None:
    info, first = echo.get_connection_info(), await pid_of(echo)
    reader, writer = await connect(echo)
    writer.write(b"1\n")
    assert await reader.readline() == b"1\n", "it is the first kernel's client"
    launchers()[0].kill()
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    await until(lambda: remote(echo).exit_code is not None)
    await echo.restart_kernel(now=True)
    assert echo.get_connection_info() == info
    assert await pid_of(echo) != first


async def test_a_request_of_a_client_that_leaves_at_once_arrives(echo: AsyncKernelManager, tmp_path: Path) -> None:
    _, writer = await connect(echo)
    lost(echo)
    writer.write(f"keep:{tmp_path}/told".encode())
    writer.close()
    await until((tmp_path / "told").exists)


async def test_a_client_that_comes_while_the_endpoints_are_closed_is_sent_away() -> None:
    async def race(turns: int) -> None:
        held = Relay("k1", {"transport": "tcp", "ip": "127.0.0.1"})
        await held.open()
        with socket.create_connection(("127.0.0.1", held.endpoint["shell_port"])) as client:
            for _ in range(turns):  # it is accepted, and becomes a transport, one after the other
                await asyncio.sleep(0)
            held.close()
            for _ in range(5):
                await asyncio.sleep(0)
            gc.collect()  # what nobody holds any more fails the test
            client.settimeout(0)
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b"", f"after {turns} turns"

    for turns in range(6):
        await runtime().call(race(turns))


async def test_endpoints_whose_opening_is_cancelled_are_free_again() -> None:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in CHANNELS]
        numbers = {f"{name}_port": probe.getsockname()[1] for name, probe in zip(CHANNELS, probes, strict=True)}

    async def opened(at: int) -> bool:
        held = Relay("k1", {"transport": "tcp", "ip": "127.0.0.1", **numbers})
        try:
            await cancelled_at(held.open(), at)
        except asyncio.CancelledError:
            return False
        finally:
            held.close()
            for _ in range(3):
                await asyncio.sleep(0)
        return True

    at = 1
    while not await runtime().call(opened(at)):
        at += 1
    assert at > len(CHANNELS)


async def test_clients_that_wait_to_be_admitted_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any user of the machine can connect, and each connection is a file of this process."""
    monkeypatch.setattr(relay_module, "MOST_WAITING", 2)
    slow = threading.Event()
    monkeypatch.setattr(relay_module, "peer_uid", lambda *addresses: os.getuid() if slow.wait(10) else None)
    held = Relay("k1", {"transport": "tcp", "ip": "127.0.0.1"})
    await runtime().call(held.open())
    came = [await asyncio.open_connection("127.0.0.1", held.endpoint["shell_port"]) for _ in range(5)]
    with contextlib.suppress(ConnectionResetError):
        assert await asyncio.wait_for(came[4][0].read(), 5) == b""
    slow.set()
    await until(lambda: len(held.streams) == 2)
    runtime().loop.call_soon_threadsafe(held.close)
    for _, writer in came:
        writer.close()
    await asyncio.sleep(0.05)


async def test_the_last_words_of_a_kernel_arrive(manager: Make) -> None:
    km = manager("python3", "-c", ECHO, "{connection_file}")
    await km.start_kernel()
    reader, writer = await connect(km)
    writer.write(b"die")
    assert await asyncio.wait_for(reader.read(), 10) == b"w" * 300_000
    writer.close()
    await until(lambda: remote(km).exit_code == 3)
    await km.shutdown_kernel(now=True)


async def test_a_server_that_forgot_closes_the_connections_and_serves_new_ones(echo: AsyncKernelManager) -> None:
    reader, writer = await connect(echo)
    writer.write(b"1\n")
    assert await reader.readline() == b"1\n"
    held = remote(echo).relay
    assert held is not None
    runtime().loop.call_soon_threadsafe(held.renew)  # as a new process: it knows nothing of the streams
    lost(echo)
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
    assert await pid_of(echo)


async def test_a_dead_path_is_noticed_and_resumed(echo: AsyncKernelManager, monkeypatch: pytest.MonkeyPatch) -> None:
    session = remote(echo).session
    assert session is not None
    reader, writer = await connect(echo)
    session.ping = 0.05  # as if the launcher had been told so: it is silent for much longer
    monkeypatch.setattr("gp_core.rendezvous.SWEEP", 0.05)
    await until(lambda: remote(echo).session not in (None, session), 10)
    writer.write(b"again\n")
    assert await asyncio.wait_for(reader.readline(), 5) == b"again\n"
    writer.close()


async def test_traffic_is_told_by_events_and_in_the_record(
    echo: AsyncKernelManager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(relay_module, "NEWS", 0.0)
    monkeypatch.setattr(relay_module, "IDLE", 0.05)
    told: list[KernelEvent] = []

    class Listens:
        @hookimpl
        def gp_kernel_event(self, event: KernelEvent) -> None:
            told.append(event)

    plugins().register(Listens(), "listens")
    try:
        reader, writer = await connect(echo)
        writer.write(b"x" * 200_000 + b"\n")
        assert len(await asyncio.wait_for(reader.readline(), 10)) == 200_001
        await until(lambda: recorded(echo).get("bytes_from_kernel", 0) >= 200_001)
        assert recorded(echo)["bytes_to_kernel"] >= 200_001
        assert recorded(echo)["streams"] >= 1
        lost(echo)
        await until(lambda: any(event.event is Event.RESUMED for event in told), 10)
        was, now = (
            next(event.data["traffic"] for event in told if event.event is wanted)
            for wanted in (Event.LOST, Event.RESUMED)
        )
        assert (was["resumes"], now["resumes"]) == (0, 1)
        assert now["bytes_from_kernel"] >= 200_001
        await until(lambda: recorded(echo)["resumes"] == 1)
    finally:
        writer.close()


def recorded(km: AsyncKernelManager) -> dict[str, Any]:
    """What the record says of the channels' traffic."""
    record = remote(km).server.store.get(str(km.kernel_id))
    assert record is not None
    return record.traffic or {}


async def test_users_of_other_accounts_are_refused(
    echo: AsyncKernelManager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(relay_module, "peer_uid", lambda peer, own: 12345)
    reader, writer = await connect(echo, "iopub_port")
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    writer.close()
    assert "a connection of user 12345 was refused" in caplog.text


async def test_connections_reach_the_kernel_in_the_order_in_which_they_were_made(
    echo: AsyncKernelManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that comes back while its old connection lives says who it is on both, and the kernel takes the last."""
    slow = iter([0.3, 0.1, 0.0, 0.0])

    def looked_up(peer: Any, own: Any) -> int:
        time.sleep(next(slow))
        return os.getuid()

    monkeypatch.setattr(relay_module, "peer_uid", looked_up)
    clients = [await connect(echo) for _ in range(4)]
    numbers = []
    for reader, writer in clients:
        writer.write(b"which")
        numbers.append(int(await asyncio.wait_for(reader.read(100), 10)))
        writer.close()
    assert numbers == sorted(numbers)


def test_the_user_of_a_connection_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as peer:
        assert peer_uid(peer.getsockname(), server.getsockname()) == os.getuid()
        assert peer_uid(("127.0.0.1", 1), server.getsockname()) == -1


async def test_ipc_endpoints_are_private_and_come_back(manager: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    short = tempfile.mkdtemp(prefix="gp-")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", short)
    km = manager("python3", "-c", ECHO, "{connection_file}")
    km.transport = "ipc"
    await km.start_kernel()
    paths = [Path(f"{km.ip}-{port}") for port in km.ports]
    for _ in range(2):
        assert all(path.is_socket() and path.stat().st_mode & 0o777 == 0o600 for path in paths)
        reader, writer = await asyncio.open_unix_connection(paths[0])
        writer.write(b"hello\n")
        assert await asyncio.wait_for(reader.readline(), 5) == b"hello\n"
        writer.close()
        await km.restart_kernel(now=True)  # upstream unlinks the paths
    await km.shutdown_kernel(now=True)
    assert not any(path.exists() for path in paths)
    shutil.rmtree(short)


async def test_a_path_that_is_too_long_is_told(manager: Make, tmp_path: Path) -> None:
    km = manager()
    km.transport, km.ip = "ipc", str(tmp_path / ("long" * 30))
    with pytest.raises(ConfigError, match=r"too long for the path of a socket.*JUPYTER_RUNTIME_DIR"):
        await km.start_kernel()


async def test_an_endpoint_that_is_taken_is_told(manager: Make) -> None:
    km = manager()
    with socket.create_server(("127.0.0.1", 0)) as other:
        km.shell_port = other.getsockname()[1]
        with pytest.raises(LaunchFailed, match=r"its shell channel cannot listen.*EndpointTaken"):
            await km.start_kernel()


async def test_a_launcher_that_cannot_carry_channels_is_told(manager: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernel_module.RemoteKernel.connected

    def older(self: Any, session: Any, hello: Any) -> Any:
        return real(self, session, type(hello)(**{**vars(hello), "capabilities": frozenset({"signal"})}))

    monkeypatch.setattr(kernel_module.RemoteKernel, "connected", older)
    with pytest.raises(LaunchFailed, match=r"cannot carry channels.*LauncherTooOld"):
        await manager().start_kernel()


async def test_too_many_connections_are_refused_and_the_others_live(
    echo: AsyncKernelManager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gp_launchers.streams.MAX_STREAMS", 4)  # the manager has one, of control
    pairs = [await connect(echo) for _ in range(3)]
    for _ in range(2):
        for reader, writer in pairs:
            writer.write(b"here\n")
            assert await asyncio.wait_for(reader.readline(), 5) == b"here\n"
        _, another = await connect(echo)
        await until(lambda: "connections at most" in caplog.text)
        another.close()
    for _, writer in pairs:
        writer.close()


async def test_many_kernels_relayed_at_once(manager: Make) -> None:
    managers = [manager("python3", "-c", ECHO, "{connection_file}") for _ in range(8)]
    await asyncio.gather(*(km.start_kernel() for km in managers))
    pids = await asyncio.gather(*(pid_of(km) for km in managers))
    assert len(set(pids)) == len(managers)
    await asyncio.gather(*(km.shutdown_kernel(now=True) for km in managers))
