"""Strangers, liars and garbage at the listener, over real TLS."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import socket
import ssl
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from gp_core import protocol, rendezvous
from gp_core.errors import LaunchFailed, ProtocolError
from gp_core.protocol import Hello, Message
from gp_core.rendezvous import Rendezvous, Session, own_addresses
from gp_core.runtime import runtime
from gp_core.server import KernelServer, kernel_server
from gp_core.store import Owner, Record
from gp_core.testing import FakeLauncher
from gp_launchers.wire import Decoder, WireError, pack_message, unpack_message

from .conftest import until

PORTS = {name: 40000 + number for number, name in enumerate(protocol.PORTS)}


class Known:
    """A kernel that the server waits for."""

    def __init__(self, kernel_id: str = "k1", token: str = "token") -> None:
        self.record = Record(
            kernel_id=kernel_id, kernel_name="x", user="ann", backend="local", token=protocol.digest(token)
        )
        self.sessions: list[Session] = []
        self.messages: list[Message] = []
        self.lost = 0

    def connected(self, session: Session, hello: Hello) -> Message:
        self.sessions.append(session)
        self.record.secret = protocol.digest(hello.secret)
        return protocol.accepted(orphan_timeout=60, linger=60, ping=30)

    def received(self, session: Session, message: Message) -> None:
        if message["type"] == "listening":
            protocol.Listening.read(message)
        self.messages.append(message)

    def relayed(self, session: Session, kind: int, stream: int, payload: bytes) -> None: ...

    def writable(self, session: Session) -> None: ...

    def disconnected(self, session: Session) -> None:
        self.lost += 1

    async def farewell(self) -> None: ...

    async def remove(self, force: bool = False) -> None: ...


@pytest.fixture
async def server() -> AsyncIterator[KernelServer]:
    made = kernel_server()
    await runtime().call(made.open())
    yield made
    made.kernels.clear()
    await asyncio.sleep(0.05)  # this loop has connections to close


@pytest.fixture
def known(server: KernelServer) -> Known:
    kernel = Known()
    server.kernels["k1"] = kernel  # type: ignore[assignment]
    return kernel


def launcher(server: KernelServer, **changes: Any) -> FakeLauncher:
    """A launcher that knows what a good one knows."""
    assert server.identity is not None
    good = {"kernel_id": "k1", "address": ("127.0.0.1", server.port), "pins": server.identity.pins, "token": "token"}
    made = FakeLauncher(**{**good, **changes})
    made.ports = PORTS
    return made


def strangers(server: KernelServer) -> int:
    assert server.rendezvous is not None
    return len(server.rendezvous._strangers)


async def raw(server: KernelServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", server.port)


# Who is let in


async def test_a_launcher_with_the_token_is_accepted_and_heard(server: KernelServer, known: Known) -> None:
    dialing = launcher(server)
    await dialing.connect()
    answer = await dialing.hello()
    assert answer is not None
    assert (answer["type"], answer["version"]) == ("accepted", 2)
    await dialing.listening()
    await dialing.send({"type": "ping", "n": 7})
    assert await dialing.receive() == {"type": "pong", "n": 7}
    assert known.messages[0]["ports"] == PORTS
    dialing.close()
    await until(lambda: known.lost == 1)


@pytest.mark.parametrize(
    ("changes", "lies", "reason"),
    [
        ({"token": "guess"}, {}, "bad_token"),
        ({"kernel_id": "k2"}, {}, "unknown_kernel"),
        ({}, {"versions": [3]}, "version"),
        ({}, {"kernel_id": "../../etc/passwd"}, "unknown_kernel"),
    ],
)
async def test_others_are_refused_for_good_and_told_why(
    server: KernelServer, known: Known, changes: dict[str, Any], lies: dict[str, Any], reason: str
) -> None:
    dialing = launcher(server, **changes)
    await dialing.connect()
    answer = await dialing.hello(**lies)
    assert answer is not None
    assert (answer["type"], answer["reason"], answer["final"]) == ("refused", reason, True)
    assert await dialing.receive() is None
    dialing.close()
    assert not known.sessions


async def test_a_launcher_that_reads_nothing_keeps_no_session_that_is_closed(
    server: KernelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "CLOSING", 0.05)
    assert server.rendezvous is not None
    session, stuck = Session(server.rendezvous), Mock(spec=asyncio.Transport)
    stuck.is_closing.return_value, stuck.get_write_buffer_size.return_value = False, 1000
    session.transport = stuck
    runtime().loop.call_soon_threadsafe(session.close)
    await until(lambda: stuck.abort.called)
    assert stuck.close.called


async def test_a_token_serves_one_launcher_only(server: KernelServer, known: Known) -> None:
    first, second = launcher(server), launcher(server)
    await first.connect()
    assert (await first.hello() or {})["type"] == "accepted"
    await second.connect()
    answer = await second.hello()
    assert answer is not None
    assert (answer["reason"], "another launcher" in answer["text"]) == ("bad_token", True)
    await first.send({"type": "ping", "n": 1})
    assert await first.receive() == {"type": "pong", "n": 1}
    first.close()
    second.close()


async def test_the_same_launcher_may_come_again_after_a_lost_answer(server: KernelServer, known: Known) -> None:
    dialing = launcher(server)
    for _ in range(3):
        await dialing.connect()
        assert (await dialing.hello() or {})["type"] == "accepted"
        dialing.close()
    assert len(known.sessions) == 3


GONE = Owner(Owner.me().host, 2**22 + 5, 0.0)


def recorded(owner: Owner, backend: str = "local") -> Record:
    """The record of a kernel of another process."""
    return Record(
        kernel_id="k9", kernel_name="x", user="a", backend=backend, token=protocol.digest("token"), owner=owner
    )


@pytest.mark.parametrize(("owner", "backend"), [(Owner.me(), "local"), (GONE, "not-installed")])
async def test_a_kernel_that_cannot_be_served_here_is_sent_on(server: KernelServer, owner: Owner, backend: str) -> None:
    server.store.put(recorded(owner, backend))
    dialing = launcher(server, kernel_id="k9")
    await dialing.connect()
    answer = await dialing.hello()
    assert answer is not None
    assert (answer["reason"], answer["final"]) == ("not_here", False)
    dialing.close()


async def test_several_ports_can_be_listened_on_and_one_that_is_taken_ends_nothing(
    server: KernelServer, known: Known
) -> None:
    first = launcher(server)
    await first.connect()
    assert (await first.hello() or {})["type"] == "accepted"
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        taken = stranger.getsockname()[1]
        with pytest.raises(LaunchFailed, match=rf"kernel k1 .*port {taken} of 127\.0\.0\.1: .*in use"):
            await runtime().call(server.listen_at("k1", f"127.0.0.1:{taken}"))
    free = f"127.0.0.1:{taken},[::1]:{taken}"
    await asyncio.gather(*(runtime().call(server.listen_at("k1", free)) for _ in range(3)))
    again = launcher(server, address=("127.0.0.1", taken))
    again.secret = first.secret
    await again.connect()
    assert (await again.hello() or {})["type"] == "accepted"
    assert known.lost == 0, "the session on the other port goes on"
    for dialing in (first, again):
        dialing.close()


async def test_a_kernel_whose_server_is_gone_is_kept_and_listed(server: KernelServer) -> None:
    record = recorded(GONE)
    record.handle, record.connection = {"kernel_id": "k9", "pid": 2**22 + 6, "started": 0.0, "log": ""}, dict(PORTS)
    server.store.put(record)
    dialing = launcher(server, kernel_id="k9")
    await dialing.connect()
    assert (await dialing.hello() or {})["type"] == "accepted"
    await until(lambda: (kept := server.store.get("k9")) and kept.owner == server.owner and kept.secret)
    dialing.close()
    await runtime().call(server.kernels["k9"].remove(force=True))


async def test_the_records_of_kernels_that_ended_without_their_server_are_tidied_up() -> None:
    server, other = kernel_server(), Owner("elsewhere.example", 1, 0.0)
    gone, kept = recorded(GONE), recorded(other)
    gone.handle = kept.handle = {"kernel_id": "k9", "pid": 2**22 + 6, "started": 0.0, "log": ""}
    kept.kernel_id = "k10"
    server.store.put(gone)
    server.store.put(kept)
    await runtime().call(server.open())
    await until(lambda: [record.kernel_id for record in server.store.list()] == ["k10"])


async def test_a_stranger_that_checks_the_pin_learns_nothing_more(server: KernelServer) -> None:
    dialing = launcher(server, pins=["0" * 64])
    with pytest.raises(ConnectionError, match="another pin"):
        await dialing.connect()


# Liars


@pytest.mark.parametrize(
    "lie",
    [
        {"type": "listening", "run": 1},
        {"type": "listening", "run": 1, "ports": dict.fromkeys(PORTS, 99999)},
        {"type": "listening", "run": "1", "ports": PORTS},
    ],
)
async def test_a_message_that_cannot_be_ends_the_session_and_nothing_else(
    server: KernelServer, known: Known, lie: dict[str, Any]
) -> None:
    dialing = launcher(server)
    await dialing.connect()
    await dialing.hello()
    await dialing.send(lie)
    assert await dialing.receive() is None
    dialing.close()
    again = launcher(server)
    again.secret = dialing.secret
    await again.connect()
    assert (await again.hello() or {})["type"] == "accepted"
    again.close()


async def test_what_a_newer_launcher_says_is_ignored(server: KernelServer, known: Known) -> None:
    dialing = launcher(server)
    await dialing.connect()
    assert (await dialing.hello(versions=[2, 3], mood="good", capabilities=["fly"]) or {})["type"] == "accepted"
    await dialing.send({"type": "mood", "value": 1})
    await dialing.send(b"\x63\x00\x00\x00\x07\x00\x00\x00\x03abc")  # a frame of a type from the future
    await dialing.send({"type": "ping", "n": 1, "extra": []})
    assert await dialing.receive() == {"type": "pong", "n": 1}
    dialing.close()


# Strangers


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "HELLO_DEADLINE", 0.3)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("start", [b"", b"\x16", b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 100])
async def test_silent_slow_and_foreign_strangers_go(server: KernelServer, start: bytes) -> None:
    reader, writer = await raw(server)
    writer.write(start)
    assert len(await asyncio.wait_for(reader.read(), 3)) < 10_000
    writer.close()
    await until(lambda: strangers(server) == 0)


@pytest.mark.usefixtures("hurried")
async def test_a_stranger_that_handshakes_and_is_silent_goes(server: KernelServer) -> None:
    dialing = launcher(server)
    await dialing.connect()
    assert await asyncio.wait_for(dialing.receive(), 3) is None
    dialing.close()


async def test_a_huge_hello_is_refused_before_it_is_read(server: KernelServer) -> None:
    dialing = launcher(server)
    await dialing.connect()
    await dialing.send((0).to_bytes(5, "big") + (2**31).to_bytes(4, "big"))
    assert await dialing.receive() is None
    dialing.close()


async def test_when_there_are_too_many_strangers_the_oldest_goes(server: KernelServer, known: Known) -> None:
    assert server.rendezvous is not None
    server.rendezvous._max_strangers = 10
    idle = [await raw(server) for _ in range(25)]
    await until(lambda: strangers(server) == 10)
    assert await asyncio.wait_for(idle[0][0].read(), 3) == b""
    dialing = launcher(server)
    await dialing.connect()
    assert (await dialing.hello() or {})["type"] == "accepted"
    dialing.close()
    for _, writer in idle:
        writer.close()


async def test_a_launcher_that_does_not_read_is_dropped(server: KernelServer, known: Known) -> None:
    dialing = launcher(server)
    await dialing.connect()
    await dialing.hello()

    def flood() -> None:
        for _ in range(400):
            if known.sessions[0].transport is None:
                return
            known.sessions[0].send({"type": "noise", "text": "x" * 500_000})

    runtime().loop.call_soon_threadsafe(flood)
    await until(lambda: known.lost == 1)
    dialing.close()


async def test_silence_breaks_a_session(server: KernelServer, known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    dialing = launcher(server)
    await dialing.connect()
    await dialing.hello()
    known.sessions[0].ping = 0.02
    await asyncio.sleep(0.1)
    assert server.rendezvous is not None
    runtime().loop.call_soon_threadsafe(server.rendezvous._sweep)
    await until(lambda: known.lost == 1)
    dialing.close()


async def test_no_secret_is_logged(server: KernelServer, known: Known, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for changes in ({}, {"token": "WRONG-TOKEN"}, {"kernel_id": "k2"}):
        dialing = launcher(server, **changes)
        dialing.secret = "SECRET-OF-LAUNCHER"
        await dialing.connect()
        await dialing.hello()
        dialing.close()
    for word in ("WRONG-TOKEN", "SECRET-OF-LAUNCHER", "token'"):
        assert word not in caplog.text


async def test_mutated_conversations_raise_nothing_and_grow_nothing(
    server: KernelServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A launcher's bytes after TLS, changed at random, GP_TEST_FRAMES times: a frame, a refusal or a closed session."""
    caplog.set_level(logging.CRITICAL)
    dice = random.Random(8877)
    good = [
        {"type": "hello", "versions": [2], "kernel_id": "k", "token": "t", "secret": "s", "run": 1},
        {"type": "listening", "run": 1, "ports": PORTS},
        {"type": "exited", "run": 1, "code": 0, "stderr": "x"},
        {"type": "ping", "n": 1},
    ]
    assert server.rendezvous is not None
    introduced: list[Hello] = []

    class Quiet(Rendezvous):
        def introduce(self, session: Session, hello: Hello) -> None:
            introduced.append(hello)

    quiet = object.__new__(Quiet)
    quiet.__dict__.update(server.rendezvous.__dict__)
    for number in range(int(os.environ.get("GP_TEST_FRAMES", "20000"))):
        session = Session(quiet)
        if number % 2:
            session.kernel = Known()
        data = bytearray(b"".join(pack_message(message) for message in good[number % 4 :]))
        for _ in range(dice.randrange(1, 8)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        try:
            session._frames(bytes(data[: dice.randrange(len(data))]))
        except (WireError, ProtocolError):
            continue
        assert len(session._decoder._buffer) <= rendezvous.MAX_HELLO + 9
    assert introduced


async def test_two_thousand_idle_strangers_delay_nobody(server: KernelServer, known: Known) -> None:
    def knock() -> list[socket.socket]:
        return [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2000)]

    idle = await asyncio.to_thread(knock)
    try:
        began = time.monotonic()
        for _ in range(20):
            dialing = launcher(server)
            dialing.secret = "same"
            await dialing.connect()
            assert (await dialing.hello() or {})["type"] == "accepted"
            dialing.close()
        assert time.monotonic() - began < 5
        await until(lambda: strangers(server) == 2000)
    finally:
        for sock in idle:
            sock.close()


# The listener


async def test_a_taken_port_means_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("GP_RESPONSE_PORT", str(port))
        made = kernel_server()
        await runtime().call(made.open())
        assert port < made.port <= port + 10
        assert made.addresses(local=True) == [f"127.0.0.1:{made.port}"]


async def test_no_port_at_all_is_an_error_that_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("GP_RESPONSE_PORT", str(taken.getsockname()[1]))
        monkeypatch.setenv("GP_RESPONSE_PORT_RETRIES", "0")
        monkeypatch.setenv("GP_RESPONSE_ADDR_ANY", "1")
        with pytest.raises(Exception, match="GP_RESPONSE_PORT"):
            await runtime().call(kernel_server().open())


async def test_on_the_loopback_any_port_is_better_than_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("GP_RESPONSE_PORT", str(taken.getsockname()[1]))
        monkeypatch.setenv("GP_RESPONSE_PORT_RETRIES", "0")
        made = kernel_server()
        await runtime().call(made.open())
        assert made.port != taken.getsockname()[1]


async def test_bind_and_advertise_are_separate_and_know_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GP_BIND_IP", "127.0.0.1, ::1")
    monkeypatch.setenv("GP_RESPONSE_IP", "gw.example.org, fd00::1")
    made = kernel_server()
    await runtime().call(made.open())
    assert made.addresses(local=False) == [f"gw.example.org:{made.port}", f"[fd00::1]:{made.port}"]
    for host in ("127.0.0.1", "::1"):
        _, writer = await asyncio.open_connection(host, made.port)
        writer.close()


def test_own_addresses_of_both_kinds_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = {"lo": ["::1"], "eth0": ["fe80::1%eth0", "2001:db8::7"], "docker0": ["fd00::1"]}
    made = {card: [SimpleNamespace(family=socket.AF_INET6, address=ip) for ip in ips] for card, ips in cards.items()}
    monkeypatch.setattr("psutil.net_if_addrs", lambda: made)
    monkeypatch.setattr("jupyter_client.localinterfaces.public_ips", lambda: ["192.0.2.7", "172.17.0.1"])
    assert own_addresses(["172.17.*", "fd00:*"], six=True) == ["192.0.2.7", "2001:db8::7"]
    assert own_addresses([]) == ["192.0.2.7", "172.17.0.1"]


async def test_only_the_loopback_is_bound_while_all_backends_run_here(server: KernelServer) -> None:
    assert server.addresses(local=False) == [f"127.0.0.1:{server.port}"]


async def test_tls_below_1_3_is_refused(server: KernelServer) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection("127.0.0.1", server.port, ssl=context)


def test_the_recorded_conversation_is_still_understood() -> None:
    """What a launcher of version 0.1.0 sends, byte for byte: a later server must go on reading it."""
    recorded = os.path.join(os.path.dirname(__file__), "recorded", "launcher-0.1.0.hex")
    with open(recorded) as file:
        stream = bytes.fromhex(file.read())
    messages = [unpack_message(payload) for kind, number, payload in Decoder().feed(stream) if (kind, number) == (0, 0)]
    hello, listening, exited = messages
    assert Hello.read(hello).speaks
    assert protocol.Listening.read(listening).run == 1
    assert protocol.Exited.read(exited).code == -9
    assert json.dumps(hello["capabilities"]) == '["restart", "signal"]'
