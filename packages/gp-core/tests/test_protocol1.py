"""Launchers of protocol 1: what they send is read with care, taken once, and only where and when it is allowed."""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import load_der_public_key
from hypothesis import given, settings
from hypothesis import strategies as st
from jupyter_client import AsyncKernelManager

from gp_core import protocol, protocol1
from gp_core.backend import KernelInfo, LaunchRequest
from gp_core.errors import ConfigError, LaunchDenied, LaunchFailed, ProtocolError
from gp_core.events import Event
from gp_core.kernel import RemoteKernel
from gp_core.ports import PortRange
from gp_core.protocol1 import Callback, CommSession, Protocol1, Terms
from gp_core.runtime import runtime
from gp_core.server import KernelServer, kernel_server
from gp_core.store import Record
from gp_core.testing.tiny_kernel import LAST_WORDS

from .conftest import TINY, ask, kernelspec, nothing_left, until

Make = Callable[..., AsyncKernelManager]
ANY = Terms(PortRange(), encrypted=False)
CURVE = {"curve_publickey": "a" * 40, "curve_secretkey": "%" * 40}
INFO: dict[str, Any] = {
    "shell_port": 40001,
    "iopub_port": 40002,
    "stdin_port": 40003,
    "control_port": 40004,
    "hb_port": 40005,
    "comm_port": 40006,
    "ip": "0.0.0.0",
    "key": "0123456789abcdef-secret",
    "transport": "tcp",
    "signature_scheme": "hmac-sha256",
    "kernel_name": "",
    "kernel_id": "k-1",
    "pid": "no number, as a JVM's may be",
    "pgid": 1,
}


@functools.cache
def private_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, protocol1.KEY_BITS)


def sealed(content: bytes, public_key: str, version: object = 1, aes_key: bytes = b"0123456789abcdef") -> bytes:
    """What a launcher sends, written as the protocol says it."""
    padder = PKCS7(128).padder()
    aes = Cipher(algorithms.AES128(aes_key), modes.ECB()).encryptor()
    body = aes.update(padder.update(content) + padder.finalize()) + aes.finalize()
    key = cast(rsa.RSAPublicKey, load_der_public_key(base64.b64decode(public_key))).encrypt(aes_key, PKCS1v15())
    envelope = {"version": version, "key": base64.b64encode(key).decode(), "conn_info": base64.b64encode(body).decode()}
    return base64.b64encode(json.dumps(envelope).encode())


def called(info: object = INFO, **more: Any) -> bytes:
    """The callback of a launch by the module's own key."""
    return sealed(json.dumps(info).encode(), Protocol1(private_key()).public_key, **more)


def read(blob: bytes) -> Callback:
    return Callback.read(blob, private_key())


# -- reading a callback


def test_a_callback_is_read() -> None:
    callback = read(called())
    assert (callback.kernel_id, callback.comm_port) == ("k-1", 40006)
    assert callback.ports == {name: INFO[name] for name in protocol.PORTS}
    assert callback.keys == {"key": INFO["key"]}
    assert read(called({**INFO, **CURVE})).keys == {"key": INFO["key"], **CURVE}


def test_a_callback_shows_no_key() -> None:
    shown = repr(read(called({**INFO, **CURVE})))
    assert INFO["key"] not in shown
    assert CURVE["curve_secretkey"] not in shown


def test_the_mark_survives_another_spelling() -> None:
    blob = called()
    envelope = json.loads(base64.b64decode(blob))
    again = base64.b64encode(json.dumps({"x": 1, **envelope}, indent=3).encode())
    assert again != blob
    assert read(again).mark == read(blob).mark
    assert read(called(aes_key=os.urandom(16))).mark != read(blob).mark


def test_version_0_is_no_callback() -> None:
    aes = Cipher(algorithms.AES128(b"k-1-and-so-on..."), modes.ECB()).encryptor()
    content = json.dumps(INFO).encode()
    blob = base64.b64encode(aes.update(content + b"%" * (-len(content) % 16)) + aes.finalize())
    with pytest.raises(ProtocolError, match="not a callback of version 1"):
        read(blob)


@pytest.mark.parametrize(
    "change",
    [
        {"shell_port": 0},
        {"shell_port": 65536},
        {"shell_port": "40001"},
        {"hb_port": True},
        {"comm_port": None},
        {"comm_port": -1},
        {"kernel_id": 7},
        {"key": ""},
        {"key": "short"},
        {"key": "\ud800" * 40},
        {"key": ["0123456789abcdef"]},
        {"transport": "ipc"},
        {"signature_scheme": "hmac-md5"},
        {"curve_publickey": "a" * 40},
        {"curve_publickey": "a" * 40, "curve_secretkey": "a" * 39},
        {"curve_publickey": "a" * 40, "curve_secretkey": "\n" + "a" * 39},
        {"curve_publickey": 1, "curve_secretkey": 2},
    ],
)
def test_what_a_callback_must_not_say(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError) as raised:
        read(called({**INFO, **change}))
    assert INFO["key"] not in str(raised.value)


@pytest.mark.parametrize("name", [*protocol.PORTS, "comm_port", "kernel_id", "key", "transport", "signature_scheme"])
def test_what_a_callback_must_say(name: str) -> None:
    with pytest.raises(ProtocolError):
        read(called({key: value for key, value in INFO.items() if key != name}))


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_other_versions_are_refused(version: object) -> None:
    with pytest.raises(ProtocolError):
        read(called(version=version))


@pytest.mark.parametrize("content", [b"", b"[]", b"1", b"\xff", b"[" * 30_000, b"9" * 5_000, b"not JSON"])
def test_other_contents_are_refused(content: bytes) -> None:
    public_key = Protocol1(private_key()).public_key
    with pytest.raises(ProtocolError):
        read(sealed(content, public_key))
    with pytest.raises(ProtocolError):
        read(base64.b64encode(content))


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=50),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from([*INFO, *CURVE, "x"]), inner, max_size=9)
    ),
    max_leaves=20,
)


def is_refused_or_read(blob: bytes) -> None:
    try:
        callback = read(blob)
    except ProtocolError:
        return
    assert type(callback.kernel_id) is str
    assert all(type(port) is int for port in [*callback.ports.values(), callback.comm_port])
    assert callback.keys["key"].encode("ascii")


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=3000))
def test_garbage_is_refused(blob: bytes) -> None:
    is_refused_or_read(blob)
    is_refused_or_read(base64.b64encode(blob))


@settings(deadline=None, max_examples=200)
@given(JSON)
def test_any_envelope_is_refused(envelope: Any) -> None:
    is_refused_or_read(base64.b64encode(json.dumps(envelope).encode()))


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.sampled_from([*INFO, *CURVE]), JSON) | JSON)
def test_any_content_is_read_or_refused(content: Any) -> None:
    is_refused_or_read(called({**INFO, **content} if isinstance(content, dict) else content))


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_changed_callback_is_read_or_refused(data: st.DataObject) -> None:
    blob = bytearray(called())
    if data.draw(st.booleans(), label="inside the base64"):
        blob = bytearray(base64.b64decode(bytes(blob)))
    for _ in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.integers(0, len(blob)))
        blob[start : start + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=20))
    is_refused_or_read(bytes(blob))
    is_refused_or_read(base64.b64encode(bytes(blob)))


def test_terms() -> None:
    inside, outside = PortRange(40000, 41000), PortRange(40000, 40005)
    assert read(called()).breach(Terms(inside, encrypted=False)) == ""
    assert "comm_port 40006" in read(called()).breach(Terms(outside, encrypted=False))
    assert "CurveZMQ" in read(called()).breach(Terms(inside, encrypted=True))
    assert read(called({**INFO, **CURVE})).breach(Terms(inside, encrypted=True)) == ""


def test_environment_is_filled_here_for_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "of the server")
    request = LaunchRequest(
        kernel_id="k", kernel_name="n", user="u", backend="b", argv=["x"], wrapped=False, submit="script"
    )
    env = {"A": "${HERE}", "B": "$$5", "C": "${NOWHERE}", "D": "${E}", "E": "e"}
    filled = {"A": "of the server", "B": "$5", "C": "${NOWHERE}", "D": "e", "E": "e"}
    made = protocol1.with_environment(request, env)
    assert made.secrets == filled, "the job's environment is all that such a launcher has"
    elsewhere = LaunchRequest(kernel_id="k", kernel_name="n", user="u", backend="b", argv=["x"], submit="api")
    assert protocol1.with_environment(elsewhere, env).env["A"] == "${HERE}", "the server's variables do not travel"


# -- the listener, and the session


@dataclass
class FakeKernel:
    """What a session sees of a `RemoteKernel`."""

    kernel_id: str = "k-1"
    exit_code: int | None = None
    session: Any = None
    said: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.info = KernelInfo(kernel_id=self.kernel_id, kernel_name="n", user="u", backend="b")
        connection = {"ip": "127.0.0.1", "key": "the server's own", **CURVE}
        self.record = Record(kernel_id=self.kernel_id, kernel_name="n", user="u", backend="b", connection=connection)

    @property
    def connection(self) -> dict[str, Any]:
        return {**self.record.connection, "ip": self.record.host or "127.0.0.1"}

    def connected(self, session: Any, hello: protocol.Hello) -> protocol.Message:
        self.said.append("connected")
        self.record.secret = protocol.digest(hello.secret)
        self.session = session
        return {}

    def received(self, session: Any, message: protocol.Message) -> None:
        self.said.append(message)

    def disconnected(self, session: Any) -> None:
        self.said.append("disconnected")
        self.session = None

    async def signal(self, signum: int) -> None:
        self.said.append(("by the platform", signum))

    @property
    def as_remote(self) -> RemoteKernel:
        return cast(RemoteKernel, self)


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[KernelServer]:
    """A server with an open listener that speaks protocol 1."""
    monkeypatch.setenv("GP_ALLOW_PROTOCOL_1", "1")
    made = kernel_server()
    await runtime().call(made.open_protocol_1())
    yield made
    assert made.protocol1 is not None
    await until(lambda: all(caller.done() for caller in made.protocol1._callers))  # type: ignore[union-attr]


async def call(server: KernelServer, blob: bytes, *, end: bool = True, wait: bool = True) -> bytes:
    """Dial as a launcher, send, and return what comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(blob)
        if end:
            writer.write_eof()
        return await asyncio.wait_for(reader.read(), 5) if wait else b""
    except ConnectionError:
        return b""
    finally:
        writer.close()


def own(server: KernelServer, **change: Any) -> bytes:
    """A callback for this server."""
    assert server.protocol1 is not None
    return sealed(json.dumps({**INFO, **change}).encode(), server.protocol1.public_key, aes_key=os.urandom(16))


@pytest.fixture
def kernel(server: KernelServer) -> Iterator[FakeKernel]:
    """A kernel whose callback the server awaits."""
    assert server.protocol1 is not None
    made = FakeKernel()
    server.protocol1.expect(made.as_remote, ANY)
    yield made
    made.exit_code = 0  # ends its session


async def test_a_callback_is_taken_once(server: KernelServer, kernel: FakeKernel) -> None:
    blob = own(server, ip="203.0.113.7")
    assert await call(server, blob) == b"", "nothing is ever answered"
    await until(lambda: kernel.said)
    assert kernel.said == ["connected"]
    assert kernel.record.connection == {"ip": "127.0.0.1", "key": INFO["key"]}, "its own keys, not its own address"
    await call(server, own(server))
    assert kernel.said == ["connected"], "a second launcher comes too late"
    assert server.protocol1 is not None
    server.protocol1.expect(kernel.as_remote, ANY)
    await call(server, blob)
    assert kernel.said == ["connected"], "nor does the old callback serve for the next launch"
    await call(server, own(server))
    await until(lambda: kernel.said == ["connected", "connected"])


async def test_strangers_are_closed_when_nothing_is_pending(server: KernelServer, kernel: FakeKernel) -> None:
    assert server.protocol1 is not None
    server.protocol1.forget(kernel.as_remote)
    assert await call(server, b"eyJ2ZXJzaW9uIjog", end=False) == b""
    assert await call(server, own(server)) == b""
    assert server.protocol1._callers == []
    assert kernel.said == []


async def test_garbage_and_unknown_kernels_change_nothing(
    server: KernelServer, kernel: FakeKernel, caplog: pytest.LogCaptureFixture
) -> None:
    await call(server, b"eyJ2")
    await call(server, b"GET / HTTP/1.1\r\n\r\n")
    await call(server, own(server, kernel_id="k-2"))
    await call(server, own(server, key="short"))
    assert kernel.said == []
    texts = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(texts) == 4
    assert not any("short" in text.replace("too short", "") for text in texts)
    await call(server, own(server))
    await until(lambda: kernel.said)


async def test_silent_and_endless_callers_are_closed(
    server: KernelServer, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    await call(server, b"e" * (protocol1.MAX_CALLBACK + 1), end=False)
    monkeypatch.setattr(protocol1, "DEADLINE", 0.1)
    await call(server, b"e", end=False)
    assert kernel.said == []


async def test_callers_push_out_the_oldest(
    server: KernelServer, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol1, "MAX_CALLERS", 3)
    waiting = [asyncio.create_task(call(server, b"e", end=False)) for _ in range(3)]
    await until(lambda: len(cast(Protocol1, server.protocol1)._callers) == 3)
    await call(server, own(server))
    await until(lambda: kernel.said)
    assert sum(caller.done() for caller in waiting) <= 1
    monkeypatch.setattr(protocol1, "MAX_CALLERS", 0)
    for caller in waiting:
        caller.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_callers_that_come_in_one_turn_push_each_other_out(
    server: KernelServer, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol1, "MAX_CALLERS", 3)

    async def come() -> list[socket.socket]:  # while the loop cannot look at any of them
        callers = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(10)]
        for caller in callers:
            caller.sendall(b"e")
            caller.settimeout(0)
        return callers

    def waiting(caller: socket.socket) -> bool:
        try:
            return bool(caller.recv(1))
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False

    callers = await runtime().call(come())
    await until(lambda: sum(map(waiting, callers)) == 3)
    for caller in callers:
        caller.close()
    await until(lambda: all(caller.done() for caller in cast(Protocol1, server.protocol1)._callers))


async def test_broken_terms_end_the_start(server: KernelServer, kernel: FakeKernel) -> None:
    assert server.protocol1 is not None
    server.protocol1.expect(kernel.as_remote, Terms(PortRange(50000, 60000), encrypted=False))
    await call(server, own(server))
    await until(lambda: len(kernel.said) == 2)
    assert kernel.said[1]["type"] == "exited"
    assert "outside port_range 50000..60000" in kernel.said[1]["detail"]
    assert kernel.record.connection["key"] == "the server's own"


async def test_the_key_is_of_the_process(server: KernelServer) -> None:
    first = server.protocol1
    await runtime().call(server.open_protocol_1())
    assert server.protocol1 is first


class Comm:
    """The listener of a launcher; keeps what it is asked."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.port = 0
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        whole = await reader.read()
        self.requests.append(json.loads(whole))  # an empty one ends a real launcher
        writer.close()

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()


@pytest.fixture
async def comm() -> AsyncIterator[Comm]:
    made = Comm()
    await made.open()
    yield made
    await made.close()


def begun(kernel: FakeKernel, comm: Comm, ports: int) -> CommSession:
    """A session whose kernel has all its ports in one."""
    info = {**INFO, **dict.fromkeys(protocol.PORTS, ports), "comm_port": comm.port}
    session = CommSession(kernel.as_remote, read(called(info)), "192.0.2.1")
    runtime().loop.call_soon_threadsafe(session.begin, "")
    return session


@pytest.fixture
async def listening(comm: Comm, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[FakeKernel, CommSession]]:
    """A kernel that listens, and its session."""
    monkeypatch.setattr(protocol1, "PULSE", 0.05)
    shell = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    kernel = FakeKernel()
    session = begun(kernel, comm, shell.sockets[0].getsockname()[1])
    await until(lambda: len(kernel.said) > 1)
    yield kernel, session
    kernel.exit_code = 0
    shell.close()
    await shell.wait_closed()


async def test_listening_is_told_when_the_ports_accept(comm: Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = probe.sockets[0].getsockname()[1]
    probe.close()
    await probe.wait_closed()
    kernel = FakeKernel()
    begun(kernel, comm, port)
    await asyncio.sleep(0.2)
    assert kernel.said == ["connected"], "the callback says nothing about the kernel's sockets"
    kernel.record.connection["ip"] = "0.0.0.0"
    shell = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", port)
    await asyncio.sleep(0.2)
    assert kernel.said == ["connected"], "nor does a service here about a kernel elsewhere"
    kernel.record.host = "127.0.0.1"
    await until(lambda: len(kernel.said) > 1)
    assert kernel.said[1] == {"type": "listening", "run": 1, "ports": dict.fromkeys(protocol.PORTS, port)}
    kernel.exit_code = 0
    shell.close()
    await shell.wait_closed()


async def test_signals_go_in_order_and_then_the_end(listening: tuple[FakeKernel, CommSession], comm: Comm) -> None:
    kernel, session = listening
    send = functools.partial(runtime().loop.call_soon_threadsafe, session.send)
    for message in (protocol.signal(2), protocol.signal(15), {"type": "unheard of"}, protocol.shutdown(2)):
        send(message)
    await until(lambda: {"shutdown": 1} in comm.requests)
    assert [asked for asked in comm.requests if asked != {"signum": 0}] == [
        {"signum": 2},
        {"signum": 15},
        {"shutdown": 1},
    ]
    assert kernel.said[2:] == ["disconnected"]
    polled = len(comm.requests)
    await asyncio.sleep(0.3)
    assert len(comm.requests) <= polled + 1, "it polls no more"


async def test_release_ends_the_launcher_only(listening: tuple[FakeKernel, CommSession], comm: Comm) -> None:
    kernel, session = listening
    runtime().loop.call_soon_threadsafe(session.send, protocol1.RELEASE)
    await until(lambda: {"shutdown": 1} in comm.requests)
    assert kernel.session is session
    await comm.close()
    runtime().loop.call_soon_threadsafe(session.send, protocol.signal(9))
    await until(lambda: ("by the platform", 9) in kernel.said)
    assert kernel.session is None
    await comm.open()


async def test_three_misses_lose_the_session_and_an_answer_resumes_it(
    listening: tuple[FakeKernel, CommSession], comm: Comm
) -> None:
    kernel, session = listening
    await until(lambda: {"signum": 0} in comm.requests)
    await comm.close()
    await until(lambda: kernel.session is None)
    await asyncio.sleep(0.3)
    assert kernel.said[2:] == ["disconnected"]
    await comm.open()
    await until(lambda: kernel.session is session)
    assert kernel.said[2:] == ["disconnected", "connected"]


async def test_a_session_of_an_earlier_launch_keeps_quiet(
    listening: tuple[FakeKernel, CommSession], comm: Comm
) -> None:
    kernel, session = listening
    kernel.record.secret = protocol.digest("of the next launch")
    await comm.close()
    runtime().loop.call_soon_threadsafe(session.send, protocol.signal(2))
    await asyncio.sleep(0.4)
    assert kernel.said[2:] == []
    await comm.open()


async def test_a_launcher_that_takes_nothing_counts_as_a_miss(
    listening: tuple[FakeKernel, CommSession], comm: Comm, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, _ = listening
    monkeypatch.setattr(protocol1, "REQUEST_DEADLINE", 0.05)
    held: list[asyncio.StreamWriter] = []
    monkeypatch.setattr(comm, "_serve", lambda reader, writer: held.append(writer))
    await comm.close()
    await comm.open()
    await until(lambda: kernel.session is None)
    kernel.exit_code = 0
    for writer in held:
        writer.close()


# -- whole lives

LAUNCHER = """
import base64, json, os, runpy, socket, sys, tempfile, threading
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.serialization import load_der_public_key
from cryptography.hazmat.primitives.padding import PKCS7
tiny, kernel, address, public, mode = sys.argv[1:6]
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(6)]
comm, ports = held[5], [one.getsockname()[1] for one in held]
for one in held[:5]:
    one.close()
names = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port", "comm_port")
info = dict(ip="127.0.0.1", key=os.urandom(16).hex(), transport="tcp", signature_scheme="hmac-sha256")
info.update(zip(names, ports))
path = os.path.join(tempfile.mkdtemp(dir=os.environ["SCRATCH"]), "c.json")
open(path, "w").write(json.dumps(info))
def requests():
    asked = {}
    with comm:
        while "shutdown" not in asked:
            with comm.accept()[0] as peer:
                whole = peer.makefile().read()
            try:
                asked = json.loads(whole)
            except ValueError:
                return  # as the real ones do
            if "signum" in asked:
                os.kill(os.getpid(), asked["signum"])
aes_key = os.urandom(16)
aes, padder = Cipher(algorithms.AES128(aes_key), modes.ECB()).encryptor(), PKCS7(128).padder()
body = padder.update(json.dumps(dict(info, ip="203.0.113.7", kernel_id=kernel)).encode()) + padder.finalize()
key = load_der_public_key(base64.b64decode(public)).encrypt(aes_key, PKCS1v15())
envelope = dict(version=1, key=base64.b64encode(key).decode(), conn_info=base64.b64encode(aes.update(body)).decode())
host, port = address.split(":")
threading.Thread(target=requests, daemon=True).start()
if mode != "silent":
    with socket.create_connection((host, int(port))) as server:
        server.sendall(base64.b64encode(json.dumps(envelope).encode()))
sys.argv[:] = [tiny, path, "never" if mode == "silent" else mode]
runpy.run_path(tiny, run_name="__main__")
"""


def older(mode: str = "serve", *, config: dict[str, Any] | None = None, scratch: Path, **env: str) -> Any:
    """A kernelspec that brings its own launcher."""
    argv = ["python3", "-c", LAUNCHER, str(TINY), "{kernel_id}", "{response_address}", "{public_key}", mode]
    config = {"launcher_protocol": 1} if config is None else config
    return kernelspec(*argv, config=config, env={"SCRATCH": str(scratch), **env})


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GP_ALLOW_PROTOCOL_1", "1")


def remote(km: AsyncKernelManager) -> RemoteKernel:
    found: RemoteKernel = km.provisioner._kernel
    return found


@pytest.mark.usefixtures("allowed")
async def test_life(manager: Make, tmp_path: Path, installation: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    km = manager(spec=older(scratch=tmp_path, WHERE="${SCRATCH}", PRICE="$$5"))
    await km.start_kernel()
    first = km.get_connection_info()
    seen = ask(km)
    assert first["ip"] == "127.0.0.1", "the platform's word, not the launcher's"
    assert seen["env"]["WHERE"] == str(tmp_path)
    assert seen["env"]["PRICE"] == "$5"
    assert seen["env"]["KERNEL_ID"] == km.kernel_id
    assert "GP_LAUNCH_SECRETS" not in seen["env"], "it is of no use to such a launcher"
    assert "JPY_PARENT_PID" not in seen["env"]
    await km.interrupt_kernel()
    await until(lambda: ask(km)["signals"] == [signal.SIGINT])

    await km.restart_kernel(now=True)
    second = km.get_connection_info()
    assert ask(km)["pid"] != seen["pid"]
    assert second["key"] != first["key"]
    assert km.session.key == second["key"]

    psutil.Process(ask(km)["pid"]).kill()
    for _ in range(200):
        if not await km.is_alive():
            break
        await asyncio.sleep(0.01)
    assert await km.provisioner.poll() == -signal.SIGKILL
    await km.restart_kernel(now=True)
    last = ask(km)["pid"]
    await km.shutdown_kernel(now=True)
    await nothing_left(installation)
    assert not psutil.pid_exists(last)
    for info in (first, second):
        assert info["key"].decode() not in caplog.text


@pytest.mark.usefixtures("allowed")
async def test_polite_shutdown_ends_the_launchers_listener(manager: Make, tmp_path: Path, installation: Path) -> None:
    km = manager(spec=older(scratch=tmp_path))
    await km.start_kernel()
    session = cast(CommSession, remote(km).session)
    port, process = session._callback.comm_port, psutil.Process(ask(km)["pid"])
    assert port in {found.laddr.port for found in process.net_connections() if found.status == psutil.CONN_LISTEN}
    await km.provisioner.shutdown_requested()
    await until(lambda: port not in {found.laddr.port for found in process.net_connections() if not found.raddr})
    assert await km.is_alive()
    await km.shutdown_kernel(now=True)  # without a listener: by the platform
    await nothing_left(installation)
    await until(lambda: not process.is_running())


@pytest.mark.usefixtures("allowed")
async def test_listener_that_died_loses_the_session_not_the_kernel(
    manager: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol1, "PULSE", 0.05)
    km = manager(spec=older(scratch=tmp_path))
    await km.start_kernel()
    told: list[Event] = []
    monkeypatch.setattr(remote(km), "tell", lambda event, **more: told.append(event))
    port = cast(CommSession, remote(km).session)._callback.comm_port
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"no JSON")
    writer.close()
    await until(lambda: remote(km).session is None)
    assert told == [Event.LOST]
    assert await km.is_alive()
    await km.interrupt_kernel()
    await until(lambda: ask(km)["signals"] == [signal.SIGINT])  # by the platform
    await km.shutdown_kernel(now=True)


@pytest.mark.usefixtures("allowed")
async def test_start_that_fails_says_why(manager: Make, tmp_path: Path, installation: Path) -> None:
    km = manager(spec=older("exit:3", scratch=tmp_path))
    with pytest.raises(LaunchFailed, match=LAST_WORDS) as raised:
        await km.start_kernel()
    assert raised.value.exit_code == 3
    km = manager(spec=older("silent", scratch=tmp_path, config={"launcher_protocol": 1, "launch_timeout": 1}))
    with pytest.raises(LaunchFailed, match="CallbackUnreachable"):
        await km.start_kernel()
    narrow = {"launcher_protocol": 1, "port_range": "1024..2047"}
    km = manager(spec=older(scratch=tmp_path, config=narrow))
    with pytest.raises(LaunchFailed, match=r"outside port_range 1024\.\.2047"):
        await km.start_kernel()
    assert not kernel_server().protocol1._pending  # type: ignore[union-attr]
    await nothing_left(installation)


async def test_not_without_the_operators_word(manager: Make, tmp_path: Path) -> None:
    km = manager(spec=older(scratch=tmp_path))
    with pytest.raises(LaunchDenied, match="GP_ALLOW_PROTOCOL_1=1"):
        await km.start_kernel()
    assert kernel_server().protocol1 is None
    await km.cleanup_resources()


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (functools.partial(older, config={}), '"launcher_protocol": 1'),
        (lambda scratch: kernelspec(config={"launcher_protocol": 1}), "no launcher of that kind"),
    ],
)
async def test_kernelspec_that_contradicts_itself(
    manager: Make, tmp_path: Path, spec: Callable[..., Any], text: str
) -> None:
    km = manager(spec=spec(scratch=tmp_path))
    with pytest.raises(ConfigError, match=text):
        await km.start_kernel()
    await km.cleanup_resources()


@pytest.mark.usefixtures("allowed")
async def test_ipv4_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GP_RESPONSE_IP", "2001:db8::1,192.0.2.1")
    monkeypatch.setenv("GP_RESPONSE_ADDR_ANY", "1")
    served = kernel_server()
    await runtime().call(served.open_protocol_1())
    assert served.ipv4_address(local=False) == f"192.0.2.1:{served.port}"
    served.response_ip = "2001:db8::1"
    with pytest.raises(ConfigError, match="GP_RESPONSE_IP"):
        served.ipv4_address(local=False)
