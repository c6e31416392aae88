"""A platform in memory, a backend for it, and a launcher that says what a test wants it to say."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import signal as signals
import ssl
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from traitlets import Unicode

from gp_launchers import __version__ as launcher_version
from gp_launchers.streams import Stream, Streams
from gp_launchers.wire import MESSAGE, VERSION, Decoder, pack_message, unpack_message

from ..backend import Backend, Finding, Handle, LaunchRequest, State, Status
from ..errors import BackendError, LaunchFailed
from ..protocol import PORTS, Message
from . import tiny_kernel


class FakeLauncher:
    """A launcher without processes: an asyncio client that speaks protocol 2, and pretends that there is a kernel.

    Step by step (`connect`, `hello`, `send`, `receive`) a test can misbehave as it likes; `run` does it all as a real
    launcher would, apart from what `Conduct` says.

    Args:
        kernel_id: Of its kernel.
        address: ``host`` and ``port`` of the server.
        pins: SHA-256 of the server's certificate in hexadecimal, one or more.
        token: The launch token.
        connection: Template of the connection file.
        env: The kernel's environment.
        argv: The kernel's command.
        conduct: What `run` does otherwise than a good launcher.
        cwd: The kernel's working directory.
        orphan_timeout: Seconds without a server until `run` ends.
    """

    @dataclass
    class Conduct:
        """What a launcher does that a good one would not.

        Args:
            hello: False: connects and stays silent.
            listening: False: its kernel never listens.
            exit_code: Its kernel ends at once with this code.
            hello_lies: Fields of ``hello`` that are changed.
            listening_lies: Fields of ``listening`` that are changed.
            deaf_to: Types of messages that it does not obey.
            garbage: Bytes sent in the place of ``hello``.
        """

        hello: bool = True
        listening: bool = True
        exit_code: int | None = None
        hello_lies: Mapping[str, Any] = field(default_factory=dict)
        listening_lies: Mapping[str, Any] = field(default_factory=dict)
        deaf_to: Collection[str] = ()
        garbage: bytes = b""

    def __init__(
        self,
        *,
        kernel_id: str,
        address: tuple[str, int],
        pins: Sequence[str],
        token: str,
        connection: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        argv: Sequence[str] = (),
        conduct: Conduct | None = None,
        cwd: str | None = None,
        orphan_timeout: float = 60.0,
    ) -> None:
        self.kernel_id = kernel_id
        self.address = address
        self.pins = pins
        self.token = token
        self.secret = os.urandom(16).hex()
        self.connection = dict(connection or {})
        self.env = {name: value.replace("$$", "$") for name, value in (env or {}).items()}
        self.argv = list(argv)
        self.cwd = cwd
        self.conduct = conduct or self.Conduct()
        self.orphan_timeout = orphan_timeout
        self.run_number = 1
        self.ports: dict[str, int] = {}
        self.told = False  #: whether it has said how its kernel is
        self.signals: list[int] = []  #: that its kernel got
        self.output: list[str] = []  #: lines of job and kernel
        self.cmdlines: list[str] = []  #: what the kernel is told that ``ps`` shows
        self._servers: list[asyncio.Server] = []
        self._streams = Streams(False, self._opened, self._pump_soon)
        self._identity: str | None = None  # the server's name for its end of the streams
        self._listens = asyncio.Event()
        self._carried: set[asyncio.Task[None]] = set()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._decoder = Decoder()
        self._waiting: list[Message] = []

    @classmethod
    def of_request(cls, request: LaunchRequest, **changes: Any) -> FakeLauncher:
        """Return the launcher that a backend is asked to start.

        Raises:
            ValueError: An option is unknown.
        """
        options = dict(word[2:].split("=", 1) for word in request.launcher_options)
        unknown = set(options) - {"kernel-id", "response-address", "public-key", "port-range", "orphan-timeout", "cwd"}
        if unknown:
            raise ValueError(f"unknown option --{min(unknown)}")
        bundle = json.loads(request.secrets["GP_LAUNCH_SECRETS"])
        host, _, port = options["response-address"].split(",")[0].rpartition(":")
        given = {
            "kernel_id": options["kernel-id"],
            "address": (host.strip("[]"), int(port)),
            "pins": options["public-key"].split(","),
            "token": bundle["token"],
            "connection": bundle["connection"],
            "env": bundle["env"],
            "argv": request.argv,
            "cwd": request.cwd,
        }
        return cls(**{**given, **changes})

    # -- step by step

    async def connect(self) -> None:
        """Open a session and check the server's pin.

        Raises:
            OSError: Nobody is there, or somebody else.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self._reader, self._writer = await asyncio.open_connection(*self.address, ssl=context)
        certificate = self._writer.get_extra_info("ssl_object").getpeercert(True)
        if hashlib.sha256(certificate).hexdigest() not in self.pins:
            self.close()
            raise ConnectionError("the server has another pin")
        self._decoder = Decoder()

    async def send(self, message: Message | bytes) -> None:
        """Send a message, or any bytes."""
        assert self._writer is not None
        self._writer.write(message if isinstance(message, bytes) else pack_message(message))
        await self._writer.drain()

    async def receive(self) -> Message | None:
        """Return the next message, or None when the server has closed the session."""
        assert self._reader is not None
        while not self._waiting:
            try:
                data = await self._reader.read(65536)
            except (OSError, ssl.SSLError):
                return None
            if not data:
                return None
            for kind, stream, payload in self._decoder.feed(data):
                if kind == MESSAGE:
                    self._waiting.append(unpack_message(payload))
                else:
                    self.relayed(kind, stream, payload)
        return self._waiting.pop(0)

    async def hello(self, **lies: Any) -> Message | None:
        """Introduce itself and return the answer; ``lies`` are fields to change."""
        message = {
            "type": "hello",
            "versions": [VERSION],
            "kernel_id": self.kernel_id,
            "token": self.token,
            "secret": self.secret,
            "launcher": launcher_version,
            "python": "3.8.0",
            "host": "fake",
            "pid": 1,
            "capabilities": ["relay", "restart", "signal"],
            "relay": {"id": self._identity, "received": self._streams.received},
            "run": self.run_number,
        }
        await self.send({**message, **lies})
        answer = await self.receive()
        if answer and answer["type"] == "accepted" and answer["relay"]:
            self.agreed(answer["relay"])
        return answer

    async def listening(self, **lies: Any) -> None:
        """Say that the kernel listens."""
        message = {"type": "listening", "run": self.run_number, "pid": 2, "ports": self.ports}
        await self.send({**message, **lies})

    # -- channels

    def agreed(self, relay: Message) -> None:
        """Go on with the streams, or begin anew, as the server says."""
        if relay["id"] == self._identity:
            self._streams.resume(relay["received"])
        else:
            self._streams.reset()
            self._identity = relay["id"]

    def relayed(self, kind: int, stream: int, payload: bytes) -> None:
        """Take a frame of the channels."""
        self._streams.receive(kind, stream, payload)

    def _opened(self, stream: Stream) -> None:
        early = bytearray()  # what comes before the kernel is connected
        stream.on_data = early.extend
        task = asyncio.ensure_future(self._carry(stream, early))
        self._carried.add(task)
        task.add_done_callback(self._carried.discard)

    async def _carry(self, stream: Stream, early: bytearray) -> None:
        await self._listens.wait()
        reader, writer = await asyncio.open_connection(
            self.connection.get("ip", "127.0.0.1"), self.ports[f"{stream.channel}_port"]
        )

        def passed_on(data: bytes) -> None:
            writer.write(data)
            stream.consumed(len(data))

        passed_on(bytes(early))
        stream.on_data, stream.on_closed = passed_on, writer.close
        while data := await reader.read(65536):
            stream.write(data)
        stream.close()
        writer.close()

    def _pump_soon(self) -> None:
        asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        while self._writer is not None and (frame := self._streams.pull()):
            self._writer.write(frame)

    async def exited(self, code: int, **lies: Any) -> None:
        """Say that the kernel has ended."""
        text = "\n".join(self.output)
        message = {"type": "exited", "run": self.run_number, "code": code, "stderr": text, "listened": bool(self.ports)}
        await self.send({**message, "reason": None, "detail": "", **lies})

    def close(self) -> None:
        """Drop the session."""
        if self._writer is not None:
            self._writer.transport.abort()  # a polite end would wait for the server's
        self._reader = self._writer = None
        self._waiting.clear()

    # -- as a real one

    async def run(self) -> int:
        """Be a launcher until the kernel is done with; returns the exit code."""
        try:
            code = await self._start_kernel()
            deadline = asyncio.get_running_loop().time() + self.orphan_timeout
            while asyncio.get_running_loop().time() < deadline:
                with contextlib.suppress(OSError, ssl.SSLError):
                    await self.connect()
                    end = await self._session(code)
                    if end is not None:
                        return end
                    deadline = asyncio.get_running_loop().time() + self.orphan_timeout
                self.close()
                await asyncio.sleep(0.1)
            return 75
        finally:
            self.close()
            self._stop_kernel()

    async def _session(self, code: tuple[int, str | None] | None) -> int | None:
        """Talk until the session breaks (None) or everything ends (exit code)."""
        if not self.conduct.hello or self.conduct.garbage:
            await self.send(self.conduct.garbage)
            await self.receive()
            return None
        answer = await self.hello(**self.conduct.hello_lies)
        if answer is None or answer["type"] != "accepted":
            return 77 if answer and answer.get("final") else None
        self.orphan_timeout = answer["orphan_timeout"]
        await self._report(code)
        while (message := await self.receive()) is not None:
            if message["type"] in self.conduct.deaf_to:
                continue
            if message["type"] == "shutdown":
                return 0
            if message["type"] == "restart":
                self.run_number, self.env = message["run"], message["env"] or {}
                self.argv = message["argv"] or self.argv
                await self._report(await self._start_kernel())
            elif message["type"] == "signal" and (code := self.deliver(message["signum"])):
                await self._report(code)
        return None

    async def _report(self, code: tuple[int, str | None] | None) -> None:
        if code is not None:
            await self.exited(code[0], reason=code[1])
            self.told = True
        elif self.ports and self.conduct.listening:
            await self.listening(**self.conduct.listening_lies)
            self.told = True

    def deliver(self, signum: int) -> tuple[int, str | None] | None:
        """Give the kernel a signal; returns its end, if that was it."""
        self.signals.append(signum)
        if signum == signals.SIGINT:
            return None
        self._stop_kernel()
        return -signum, None

    async def _start_kernel(self) -> tuple[int, str | None] | None:
        """Pretend to run argv as `tiny_kernel` would; returns its end, if it ends at once."""
        self._stop_kernel()
        mode = self.argv[4] if len(self.argv) > 4 else "serve"
        if self.argv and not os.access(self.argv[0], os.X_OK):
            return 127, "CommandNotFound"
        self.output.append(tiny_kernel.HELLO)
        if self.conduct.exit_code is not None:
            return self.conduct.exit_code, None
        if mode.startswith("exit:"):
            self.output.append(tiny_kernel.LAST_WORDS)
            return int(mode[5:]), None
        if mode == "serve":
            for name in PORTS:
                host = self.connection.get("ip", "127.0.0.1")
                server = await asyncio.start_server(self._answer, host, self.connection.get(name) or 0)
                self._servers.append(server)
                self.ports[name] = server.sockets[0].getsockname()[1]
            self._listens.set()
        return None

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readline():
            seen = {"env": self.env, "cwd": self.cwd, "words": self.argv[5:], "pid": 2, "host": "fake"}
            writer.write(json.dumps({**seen, "signals": self.signals, "cmdlines": self.cmdlines}).encode())
        writer.close()

    def _stop_kernel(self) -> None:
        for server in self._servers:
            server.close()
        self._servers.clear()
        self._listens.clear()
        for task in self._carried:
            task.cancel()


@dataclass
class Fault:
    """Something that goes wrong in a call of the platform.

    Args:
        call: "submit", "status", "signal", "terminate", "logs" or "discover".
        error: Raised in the place of an answer.
        delay: Seconds before the call does anything.
        answer: What "status" answers, whatever is true.
        lose: "submit" works but its answer is the error.
        on: Which calls of that kind, counted from 1; None: all.
    """

    call: str
    error: Exception | None = None
    delay: float = 0.0
    answer: State | None = None
    lose: bool = False
    on: Collection[int] | None = None


@dataclass
class FakeJob:
    """A job of the platform: a `FakeLauncher` and what ``ps`` and the log would show."""

    job_id: str
    kernel_id: str
    launcher: FakeLauncher | None
    label: str = ""
    task: asyncio.Task[None] | None = None
    state: State = State.PENDING
    exit_code: int | None = None
    log: list[str] = field(default_factory=list)


class FakePlatform:
    """A scheduler in memory; everything happens on the runtime's loop.

    Args:
        name: `FakeBackend`'s option ``platform``; the same name is the same platform in every object.
    """

    _all: ClassVar[dict[str, FakePlatform]] = {}

    def __init__(self, name: str) -> None:
        self.name = name
        self.jobs: dict[str, FakeJob] = {}
        self.faults: list[Fault] = []
        self.silent = False  #: nothing answers
        self.pending = 0.0  #: seconds that a job waits for its start
        self.conduct: FakeLauncher.Conduct | None = None  #: of every launcher from now on
        self.calls: dict[str, int] = {}
        self._numbers = itertools.count(1)

    @classmethod
    def named(cls, name: str) -> FakePlatform:
        """Return the platform of a name, the same one every time."""
        return cls._all.setdefault(name, cls(name))

    async def call(self, kind: str) -> Fault | None:
        """Count a call, and let what is to go wrong go wrong; returns a fault that only changes the answer."""
        self.calls[kind] = number = self.calls.get(kind, 0) + 1
        await asyncio.sleep(0)
        if self.silent:
            raise BackendError("the fake platform does not answer")
        for fault in self.faults:
            if fault.call == kind and (fault.on is None or number in fault.on):
                await asyncio.sleep(fault.delay)
                if fault.error is not None and not fault.lose:
                    raise fault.error
                return fault
        return None

    def submit(self, request: LaunchRequest, label: str = "") -> FakeJob:
        """Take a job; ``label`` is shown with it."""
        job = FakeJob(f"job-{next(self._numbers)}", request.kernel_id, None, label)
        self.jobs[job.job_id] = job
        job.task = asyncio.get_running_loop().create_task(self._life(job, request))
        return job

    async def _life(self, job: FakeJob, request: LaunchRequest) -> None:
        try:
            await asyncio.sleep(self.pending)
            job.state = State.RUNNING
            try:
                job.launcher = FakeLauncher.of_request(request, conduct=self.conduct)
            except ValueError as error:
                job.log.append(f"gp-launcher: {error}; see --help")
                job.exit_code = 2
                return
            job.launcher.output = job.log
            job.launcher.cmdlines = [" ".join(request.command())]
            job.exit_code = await job.launcher.run()
        except asyncio.CancelledError:
            job.exit_code = -signals.SIGKILL
        finally:
            job.state = State.GONE

    async def kill(self, job_id: str) -> None:
        """End a job, whoever it belongs to; one that is gone or unknown is none."""
        if (job := self.jobs.get(job_id)) is not None and job.task is not None:
            job.task.cancel()
            await asyncio.gather(job.task, return_exceptions=True)

    async def lose(self, job_id: str) -> None:
        """End a job and forget that it ever was."""
        await self.kill(job_id)
        self.jobs.pop(job_id, None)


class FakeBackend(Backend):
    """The backend of a `FakePlatform`: short, right, and the base of deliberately broken ones."""

    name = "fake"
    poll_interval = (0.01, 0.1)

    platform = Unicode("default", help="Name of the FakePlatform.").tag(config=True)

    @property
    def api(self) -> FakePlatform:
        """The platform."""
        return FakePlatform.named(self.platform)

    async def launch(self, request: LaunchRequest) -> Handle:
        fault = await self.api.call("submit")
        if not request.argv:
            raise LaunchFailed("there is nothing to run")
        job = self.api.submit(request, self.installation)
        if fault and fault.error:
            raise fault.error
        return {"kernel_id": request.kernel_id, "job": job.job_id}

    async def status(self, handle: Handle) -> Status:
        fault = await self.api.call("status")
        if fault and fault.answer:
            return Status(state=fault.answer)
        job = self.api.jobs.get(handle["job"])
        if job is None:
            return Status(state=State.GONE)
        return Status(state=job.state, host="127.0.0.1", exit_code=job.exit_code)

    async def signal(self, handle: Handle, signum: int) -> bool:
        await self.api.call("signal")
        job = self.api.jobs.get(handle["job"])
        if signum == signals.SIGKILL or job is None or job.state is not State.RUNNING or job.launcher is None:
            return False
        job.launcher.deliver(signum)
        return True

    async def terminate(self, handle: Handle, *, force: bool) -> None:
        await self.api.call("terminate")
        await self.api.kill(handle["job"])

    async def logs(self, handle: Handle, *, tail: int = 50) -> str:
        await self.api.call("logs")
        job = self.api.jobs.get(handle["job"])
        return "\n".join(job.log[-tail:]) if job else ""

    async def discover(self, kernel_id: str | None = None) -> list[Handle]:
        await self.api.call("discover")
        return [
            {"kernel_id": job.kernel_id, "job": job.job_id}
            for job in self.api.jobs.values()
            if job.state is not State.GONE and job.label == self.installation and kernel_id in (None, job.kernel_id)
        ]

    async def check(self) -> list[Finding]:
        advice = "set FakePlatform.silent to False" if self.api.silent else ""
        return [Finding(ok=not self.api.silent, subject="fake platform", text=f"{self.platform}", advice=advice)]
