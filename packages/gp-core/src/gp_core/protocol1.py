"""Protocol 1: launchers that come with the kernelspec, call back once and then listen for requests.

Spoken only where the operator allows it, for kernelspecs that say ``"launcher_protocol": 1``, and only while such a
launch is pending. The launcher encrypts its connection info by AES-128-ECB and the AES key by RSAES-PKCS1-v1_5, because
that protocol says so; nothing else here uses them. They keep the kernel's keys from somebody who only listens. They do
**not** prove who calls: whoever knows the kernel's id and the public key, which stands in the launcher's argv, can call
first. And whoever reaches the launcher's port can signal the kernel. It has no lease: it outlives a killed server.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import secrets
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from . import protocol
from .backend import LaunchRequest
from .command import expanded
from .errors import ProtocolError
from .ports import PortRange
from .protocol import PORTS, Hello, Message
from .runtime import runtime

if TYPE_CHECKING:
    from .kernel import RemoteKernel
    from .rendezvous import Session

log = logging.getLogger(__name__)

KEY_BITS = 2048  # the launchers take any size
MAX_CALLBACK, MAX_CALLERS = 64 * 1024, 64  # bytes, at a time; a real one has 1,200 and is there for an instant
DEADLINE, REQUEST_DEADLINE = 10.0, 5.0  # seconds for a callback to arrive as a whole, for a request to be taken
PULSE, MISSES = 1.5, 3  # seconds between polls; how many unanswered ones in a row lose the session
MUTE = "mute"  # capability of a launcher that does not tell of its kernel's end: the platform is asked
RELEASE: Message = {"type": "release"}  # the kernel was asked to end, and its launcher must not keep the process

_CURVE = ("curve_publickey", "curve_secretkey")
_Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


@dataclass(frozen=True)
class Terms:
    """What a launch demands of its callback: ports in a range, and CurveZMQ keys if encryption is required."""

    port_range: PortRange
    encrypted: bool


@dataclass(frozen=True)
class Callback:
    """What a launcher told; nothing of it is proven."""

    kernel_id: str
    comm_port: int
    ports: Mapping[str, int]
    keys: Mapping[str, str] = field(repr=False)  #: HMAC key, and the pair of curve keys or none of it
    mark: bytes = field(repr=False)  #: tells it from every other callback, however it is written

    @classmethod
    def read(cls, blob: bytes, private_key: rsa.RSAPrivateKey) -> Callback:
        """Decrypt and check what a launcher sent.

        Raises:
            ProtocolError: It is no callback; the text quotes nothing of it. Version 0, whose key is no secret, is none.
        """
        try:
            envelope = json.loads(b64decode(blob, validate=True))
            if type(envelope) is not dict or envelope.get("version") != 1:
                raise ProtocolError("not a callback of version 1")
            aes_key = private_key.decrypt(b64decode(_text(envelope, "key"), validate=True), PKCS1v15())
            aes = Cipher(algorithms.AES128(aes_key), modes.ECB()).decryptor()
            padded = aes.update(b64decode(_text(envelope, "conn_info"), validate=True)) + aes.finalize()
            unpadder = PKCS7(128).unpadder()
            info = json.loads(unpadder.update(padded) + unpadder.finalize())
        except (ValueError, RecursionError):
            raise ProtocolError("not a callback of version 1") from None
        if type(info) is not dict or info.get("transport") != "tcp" or info.get("signature_scheme") != "hmac-sha256":
            raise ProtocolError("the callback has no connection info of tcp and hmac-sha256")
        keys = {name: _text(info, name) for name in ("key", *_CURVE) if name == "key" or info.get(name)}
        if len(keys["key"]) < 16 or not keys["key"].isascii():
            raise ProtocolError("the callback's key is too short or not ASCII")
        if len(keys) == 2 or not all(_Z85.fullmatch(keys[name]) for name in _CURVE if name in keys):
            raise ProtocolError("the callback has no proper pair of curve keys")
        ports = {name: _port(info, name) for name in PORTS}
        mark = hashlib.sha256(aes_key).digest()
        return cls(_text(info, "kernel_id"), _port(info, "comm_port"), ports, keys, mark)

    def breach(self, terms: Terms) -> str:
        """Return how the callback breaks a launch's terms, or nothing."""
        for name, port in {**self.ports, "comm_port": self.comm_port}.items():
            if port not in terms.port_range:
                return f"{name} {port} is outside port_range {terms.port_range}"
        unencrypted = terms.encrypted and "curve_publickey" not in self.keys
        return "transport_encryption is required, and its launcher made no CurveZMQ keys" if unencrypted else ""


def _text(mapping: Mapping[str, Any], name: str) -> str:
    if type(value := mapping.get(name)) is not str:
        raise ProtocolError(f"the callback's {name} is not a text")
    return value


def _port(mapping: Mapping[str, Any], name: str) -> int:
    if type(value := mapping.get(name)) is not int or not 0 < value <= 65535:
        raise ProtocolError(f"the callback's {name} is not a port")
    return value


def with_environment(request: LaunchRequest, env: Mapping[str, str]) -> LaunchRequest:
    """Return the request for a launcher that knows no secrets, and has its environment from the job alone.

    Args:
        request: Of the launch.
        env: Of the kernel; ``${X}`` in it is filled here, from this machine's variables if argv runs on this machine.
    """
    filled = expanded(env, os.environ if request.submit == "script" else {})
    return replace(request, env=env, secrets=filled)


class Protocol1:
    """The process's key pair, made anew by every process, and the launches that await a callback."""

    def __init__(self, private_key: rsa.RSAPrivateKey) -> None:
        der = private_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.public_key = b64encode(der).decode()
        self._private_key = private_key
        self._pending: dict[str, tuple[RemoteKernel, Terms]] = {}
        self._taken: deque[bytes] = deque(maxlen=4096)  # a restarted kernel must not get its old callback again
        self._callers: list[asyncio.Task[None]] = []

    @classmethod
    async def open(cls) -> Protocol1:
        return cls(await runtime().blocking(rsa.generate_private_key, 65537, KEY_BITS))

    def expect(self, kernel: RemoteKernel, terms: Terms) -> None:
        """Await the callback of a launch that begins."""
        self._pending[kernel.info.kernel_id] = kernel, terms

    def forget(self, kernel: RemoteKernel) -> None:
        """Take no callback for the kernel any more; calling it again is harmless."""
        self._pending.pop(kernel.info.kernel_id, None)

    def hand_over(self, transport: asyncio.Transport, data: bytes) -> bool:
        """Take a connection that does not speak TLS, or return False: no launch awaits one."""
        if not self._pending:
            return False
        stream = asyncio.StreamReaderProtocol(reader := asyncio.StreamReader())
        transport.set_protocol(stream)
        stream.connection_made(transport)
        stream.data_received(data)
        self._callers = [caller for caller in self._callers if not caller.done()]
        if len(self._callers) >= MAX_CALLERS:
            self._callers.pop(0).cancel()
        caller = runtime().spawn(self._hear(reader, transport), name="callback")
        caller.add_done_callback(lambda _: transport.abort())  # even if it was sent away before it began
        self._callers.append(caller)
        return True

    async def _hear(self, reader: asyncio.StreamReader, transport: asyncio.Transport) -> None:
        try:
            await asyncio.wait_for(reader.readexactly(MAX_CALLBACK + 1), DEADLINE)
        except asyncio.IncompleteReadError as end:
            self.take(end.partial, str((transport.get_extra_info("peername") or "?")[0]))
        except (OSError, asyncio.TimeoutError):
            pass

    def take(self, blob: bytes, address: str) -> None:
        """Accept a callback, once; nothing is answered whatever comes of it."""
        try:
            callback = Callback.read(blob, self._private_key)
            if callback.mark in self._taken or callback.kernel_id not in self._pending:
                raise ProtocolError("no launch awaits this callback, or it was taken before")
        except ProtocolError as error:
            log.warning("call from %s refused: %s", address, error)
            return
        kernel, terms = self._pending.pop(callback.kernel_id)
        self._taken.append(callback.mark)
        CommSession(kernel, callback, address).begin(callback.breach(terms))


class CommSession:
    """What `RemoteKernel` has for a `rendezvous.Session` of such a launcher: one connection for every request.

    Each carries a whole request and waits for its end, because launchers end at an empty or broken one.
    """

    def __init__(self, kernel: RemoteKernel, callback: Callback, address: str) -> None:
        self.kernel: RemoteKernel | None = kernel  # None: fenced off by a newer session
        self.address = address
        self._kernel, self._callback, self._me = kernel, callback, cast("Session", self)
        self._turn = asyncio.Lock()
        self._released = False
        self._hello = Hello(
            kernel_id=callback.kernel_id, token="", secret=secrets.token_hex(), launcher="of protocol 1", python="",
            host="", pid=0, run=kernel.record.run, capabilities=frozenset({MUTE}), speaks=True,
        )  # fmt: skip

    def begin(self, breach: str) -> None:
        """Become the kernel's session; end its start if the callback broke the terms."""
        kernel, record = self._kernel, self._kernel.record
        if not breach:
            own = {name: value for name, value in record.connection.items() if name not in _CURVE}
            record.connection = {**own, **self._callback.keys}
        kernel.connected(self._me, self._hello)
        if breach:
            kernel.received(self._me, {"type": "exited", "run": record.run, "code": None, "detail": breach})
        else:
            runtime().spawn(self._live(), name=f"launcher of kernel {kernel.info.kernel_id}")

    def send(self, message: Message) -> None:
        """Send what this protocol has words for: signals, and the launcher's end."""
        name = f"clean-up of the launcher of kernel {self._kernel.info.kernel_id}"  # the process's end waits for it
        if message["type"] == "signal":
            runtime().spawn(self._say({"signum": message["signum"]}), name="signal")
        elif message["type"] in ("release", "shutdown"):
            self._released = True
            runtime().spawn(self._say({"shutdown": 1}), name=name)
            if message["type"] == "shutdown":
                self._kernel.disconnected(self._me)

    def close(self, why: str = "") -> None:
        """End the session."""
        self._released = True

    @property
    def _current(self) -> bool:
        """Whether the kernel is still the one that this launcher started."""
        kept = self._kernel.record.secret
        return kept is not None and protocol.matches(self._hello.secret, kept) and self._kernel.exit_code is None

    async def _say(self, request: Mapping[str, int]) -> None:
        if not await self._taken(request) and "signum" in request and self._current:
            self._kernel.disconnected(self._me)
            await self._kernel.signal(request["signum"])  # now by the platform

    async def _taken(self, request: Mapping[str, int]) -> bool:
        async with self._turn:
            return await _reaches(self._kernel.connection["ip"], self._callback.comm_port, json.dumps(request))

    async def _live(self) -> None:
        """Tell when the kernel listens, which the launcher does not know, and then whether the launcher does."""
        kernel, record, ports = self._kernel, self._kernel.record, dict(self._callback.ports)
        for name in ("shell_port", "iopub_port", "control_port"):
            # the platform tells the host: at an address that we guess another service may listen
            while (record.connection["ip"] in ("0.0.0.0", "::") and record.host is None) or not await _reaches(
                kernel.connection["ip"], ports[name]
            ):
                await asyncio.sleep(0.05)
                if not self._current:
                    return
        kernel.received(self._me, {"type": "listening", "run": record.run, "ports": ports})
        missed = 0
        while True:
            await asyncio.sleep(PULSE)
            answered = self._current and not self._released and await self._taken({"signum": 0})
            if self._released or not self._current:
                return
            missed = 0 if answered else missed + 1
            if answered and kernel.session is None:
                kernel.connected(self._me, self._hello)
            elif missed == MISSES:
                kernel.disconnected(self._me)


async def _reaches(host: str, port: int, text: str = "") -> bool:
    """Connect and write a text; whether the other end took it and closed, or accepts at all if there is no text."""

    async def deliver() -> None:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            if text:
                writer.write(text.encode())
                writer.write_eof()
                await reader.read(1)
        finally:
            writer.close()

    try:
        await asyncio.wait_for(deliver(), REQUEST_DEADLINE)
    except (OSError, asyncio.TimeoutError):
        return False
    return True
