"""An installation of its own for tests: key, records, listener - and tiny kernels started through one backend."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from traitlets.config import Config

from ..backend import Backend, Handle, LaunchRequest, State, Status
from ..identity import Identity
from ..kernel import RemoteKernel
from ..planning import launcher_options
from ..ports import PortRange
from ..server import KernelServer
from ..starting import Plan
from ..store import Owner, Record
from . import tiny_kernel

TOLD = 2.0  # seconds until a platform knows of a job whose launcher has called back already


async def eventually(holds: Callable[[], Any], within: float, *, every: float = 0.02) -> bool:
    """Wait until something is true.

    Args:
        holds: A function, which may be async.
        within: Seconds.
        every: Seconds between two looks.

    Returns:
        Whether it came true in time.
    """
    deadline = time.monotonic() + within
    while True:
        answer = holds()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer:
            return True
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(every)


@dataclass
class Started:
    """A kernel that runs.

    Args:
        kernel: As the core sees it.
        backend: The object that started it.
        request: What that got, secrets included.
    """

    kernel: RemoteKernel
    backend: Backend
    request: LaunchRequest

    @property
    def kernel_id(self) -> str:
        return self.request.kernel_id

    @property
    def handle(self) -> Handle:
        """The backend's handle, as it comes back from the store."""
        copy: Handle = json.loads(json.dumps(self.kernel.record.handle))
        return copy

    @property
    def secrets(self) -> list[str]:
        """What nobody but launcher and server may see: the launch token and the kernel's key."""
        bundle = json.loads(self.request.secrets["GP_LAUNCH_SECRETS"])
        return [bundle["token"], bundle["connection"]["key"]]

    async def ask(self, within: float = 10.0) -> dict[str, Any]:
        """Return what the kernel sees of itself, asked over its shell port.

        Raises:
            OSError: It cannot be reached there.
        """
        connection = self.kernel.connection

        async def asked() -> dict[str, Any]:
            reader, writer = await asyncio.open_connection(connection["ip"], connection["shell_port"])
            try:
                writer.write(b"?\n")
                answer: dict[str, Any] = json.loads(await reader.read())
                return answer
            finally:
                writer.close()

        return await asyncio.wait_for(asked(), within)

    async def answers(self) -> bool:
        """Whether the kernel answers."""
        try:
            await self.ask(2.0)
        except (OSError, ValueError, asyncio.TimeoutError):
            return False
        return True


class MemoryStore:
    """Records as JSON in memory: nothing waits for a disk."""

    def __init__(self) -> None:
        self._records: dict[str, str] = {}

    def put(self, record: Record) -> None:
        self._records[record.kernel_id] = record.to_json()

    def get(self, kernel_id: str) -> Record | None:
        text = self._records.get(kernel_id)
        return Record.from_json(text) if text else None

    def remove(self, kernel_id: str) -> None:
        self._records.pop(kernel_id, None)

    def list(self) -> list[Record]:
        return [Record.from_json(text) for text in self._records.values()]

    def sweep(self) -> None:
        pass

    def take(self, kernel_id: str, owner: Owner) -> Record | None:
        record = self.get(kernel_id)
        if record is not None and not record.is_owned:
            record.owner, record.left = owner, None
            self.put(record)
        return record


class Installation:
    """A server that knows one backend, and starts tiny kernels through it.

    All coroutines run on the runtime's loop.

    Args:
        folder: Data folder; the far side must see it under the same path if the backend takes the launcher from there.
        backend_class: To start kernels with.
        options: Of the backend, as in the ``config`` of a kernel.json.
        python: A Python >= 3.8 of the far side that runs the kernels.
        start_timeout: Seconds until a kernel must listen.
        channels: "relay" or "direct": how the tests reach kernels.
    """

    def __init__(
        self,
        folder: Path,
        backend_class: type[Backend],
        options: Mapping[str, Any],
        *,
        python: str,
        start_timeout: float = 60.0,
        channels: str = "relay",
    ) -> None:
        self.folder = folder
        self.backend_class = backend_class
        self.options = dict(options)
        self.python = python
        self.start_timeout = start_timeout
        self.channels = channels
        self.requests: dict[str, LaunchRequest] = {}  #: what backends got, by kernel id
        self.server = KernelServer(Config({"KernelServer": {"response_port": 0}}), store=MemoryStore())
        self._kernels: list[RemoteKernel] = []
        self._variable: str | None = None

    async def __aenter__(self) -> Installation:
        self._variable = os.environ.get("GP_DATA_DIR")
        os.environ["GP_DATA_DIR"] = str(self.folder)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        await self.server.open()
        return self

    async def __aexit__(self, *error: object) -> None:
        for kernel in self._kernels:
            with contextlib.suppress(Exception):  # a broken backend has been told of by the test already
                await asyncio.wait_for(kernel.remove(force=True), 30)
        self.disappear()
        if self._variable is None:
            del os.environ["GP_DATA_DIR"]
        else:
            os.environ["GP_DATA_DIR"] = self._variable

    def disappear(self) -> None:
        """Close the listener and every session, as if the server's process had ended."""
        if self.server.rendezvous is not None:
            self.server.rendezvous.close()
            self.server.rendezvous = None

    @contextlib.contextmanager
    def as_another(self) -> Iterator[None]:
        """Be another installation of the same user for a while, as far as backends can tell."""
        Identity.load(self.folder / "another")
        os.environ["GP_DATA_DIR"] = str(self.folder / "another")
        try:
            yield
        finally:
            os.environ["GP_DATA_DIR"] = str(self.folder)

    # -- kernels

    def backend(self) -> Backend:
        """Return a new object of the backend, that knows nothing of any other."""
        backend = self.backend_class(**self.options)
        launch = backend.launch

        async def noted(request: LaunchRequest) -> Handle:
            self.requests[request.kernel_id] = request
            return await launch(request)

        setattr(backend, "launch", noted)  # noqa: B010  on this object only
        return backend

    def request(
        self,
        mode: str = "serve",
        words: Sequence[str] = (),
        *,
        argv: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        kernel_id: str | None = None,
        more_options: Sequence[str] = (),
    ) -> LaunchRequest:
        """Return the request for one tiny kernel.

        Args:
            mode: "serve", "never" (it does not listen) or "exit:CODE" (it ends at once).
            words: Arguments for the kernel to tell back.
            argv: Another command.
            env: Variables for the kernel.
            cwd: Its working directory.
            kernel_id: Default: a new one.
            more_options: Of the launcher.
        """
        kernel_id = kernel_id or str(uuid.uuid4())
        source = inspect.getsource(tiny_kernel)
        return LaunchRequest(
            kernel_id=kernel_id,
            kernel_name="tiny",
            user="tester",
            backend=self.backend_class.name,
            argv=argv or [self.python, "-c", source, "{connection_file}", mode, *words],
            env={"KERNEL_ID": kernel_id, "KERNEL_USERNAME": "tester", **(env or {})},
            cwd=cwd,
            launcher_file=self.server.launcher_file,
            listener=self.server.listener,
            launcher_options=[
                *launcher_options(self.server, kernel_id, PortRange(), 60.0, local=self.backend_class.runs_here),
                *more_options,
            ],
        )

    def kernel(self, request: LaunchRequest, *, orphan_timeout: float = 60.0) -> RemoteKernel:
        """Return the object of a kernel that is not launched yet."""
        record = Record(
            kernel_id=request.kernel_id,
            kernel_name=request.kernel_name,
            user=request.user,
            backend=request.backend,
            options=self.options,
            orphan_timeout=orphan_timeout,
        )
        kernel = RemoteKernel(self.server, self.backend(), record)
        self._kernels.append(kernel)
        return kernel

    def plan(self, request: LaunchRequest) -> Plan:
        """Return how to start a kernel."""
        relayed = self.channels == "relay"
        connection = {
            "transport": "tcp",
            "ip": "127.0.0.1" if relayed else self.backend_class.bind_address,
            "key": os.urandom(32).hex(),
            "signature_scheme": "hmac-sha256",
            "kernel_name": "tiny",
            **dict.fromkeys(tiny_kernel.PORTS, 0),
        }
        far = dict(connection) if relayed else None
        return Plan(request=request, connection=connection, far=far, timeout=self.start_timeout)

    async def start(self, request: LaunchRequest | None = None, *, orphan_timeout: float = 60.0) -> Started:
        """Start a kernel and return when it listens.

        Args:
            request: Default: that of a new tiny kernel.
            orphan_timeout: Seconds without a server until it ends.

        Raises:
            LaunchFailed: It did not start.
        """
        request = request or self.request()
        kernel = self.kernel(request, orphan_timeout=orphan_timeout)
        await kernel.launch(self.plan(request))

        async def told() -> bool:
            assert kernel.record.handle is not None
            return (await kernel.backend.look(kernel.record.handle)).state is not State.PENDING

        await eventually(told, TOLD)
        return Started(kernel, kernel.backend, self.requests[request.kernel_id])

    @contextlib.asynccontextmanager
    async def starting(self, request: LaunchRequest) -> AsyncIterator[tuple[RemoteKernel, asyncio.Task[None]]]:
        """Start a kernel in a task that is cancelled at the end of the block."""
        kernel = self.kernel(request)
        task = asyncio.ensure_future(kernel.launch(self.plan(request)))
        try:
            yield kernel, task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def gone(self, handle: Handle, within: float) -> Status:
        """Wait until a job is gone and return the last status.

        Raises:
            TimeoutError: It is not, in time.
        """
        backend, deadline = self.backend(), time.monotonic() + within
        while (status := await backend.look(handle)).state is not State.GONE:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the job is not gone after {within:g} s but {status}")
            await asyncio.sleep(0.05)
        return status
