"""A kernel that a manager and a client drive, blocking or async alike."""

from __future__ import annotations

import asyncio
import inspect
import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager

READY = 60.0
"""Seconds for a kernel to answer its first request, on a busy machine."""


class Driven:
    """A manager with its client.

    Args:
        manager: Blocking or async.
        loop: Where the async one's coroutines run.
    """

    def __init__(self, manager: KernelManager, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.manager = manager
        self.client: Any = None
        self._loop = loop

    def do(self, value: Any, timeout: float = 60.0) -> Any:
        """Return a value, or what it comes to if it must be awaited first."""
        if inspect.isawaitable(value):
            assert self._loop is not None
            return self._loop.run_until_complete(asyncio.wait_for(value, timeout))
        return value

    def start(self, **kwargs: Any) -> None:
        """Start the kernel and connect a client that is ready for the first cell."""
        self.do(self.manager.start_kernel(**kwargs))
        self.client = self.manager.client()
        self.client.start_channels()
        self.ready()

    def ready(self) -> None:
        """Wait until the kernel answers."""
        self.do(self.client.wait_for_ready(timeout=READY), READY + 5)

    def restart(self, **kwargs: Any) -> None:
        """Restart the kernel and wait until it answers the same client."""
        self.do(self.manager.restart_kernel(**kwargs))
        self.ready()

    def shutdown(self, **kwargs: Any) -> None:
        """Shut the kernel down, if there is one, and the client."""
        if self.client is not None:
            self.client.stop_channels()
            self.client = None
        if self.manager.has_kernel:
            self.do(self.manager.shutdown_kernel(**kwargs))

    @property
    def alive(self) -> bool:
        """What `is_alive` says."""
        return bool(self.do(self.manager.is_alive()))

    @property
    def exit_code(self) -> int | None:
        """What `poll` says."""
        assert self.manager.provisioner is not None
        return asyncio.run(self.manager.provisioner.poll())

    # -- cells

    def run(self, code: str, timeout: float = 30.0) -> str:
        """Run a cell and return what it printed, and its result or error.

        A kernel may throw away what comes right after an interrupted cell; it is sent again then.
        """
        deadline = time.monotonic() + timeout
        while True:
            message_id: str = self.client.execute(code)
            if self.reply(message_id, deadline - time.monotonic())["status"] != "aborted":
                return self.output(message_id, deadline - time.monotonic())

    def output(self, message_id: str, timeout: float = 30.0) -> str:
        """Wait for the end of a cell and return what it printed, and its result or error."""
        deadline = time.monotonic() + timeout
        seen: list[str] = []
        while True:
            content = self._told_of(message_id, deadline)["content"]
            if content.get("execution_state") == "idle":
                return "".join(seen)
            seen.append(
                content.get("text") or content.get("data", {}).get("text/plain", "") or content.get("ename", "")
            )

    def start_cell(self, code: str, until: str, timeout: float = 30.0) -> str:
        """Send a cell and return its message id once it has printed something."""
        message_id: str = self.client.execute(code, stop_on_error=False)
        deadline = time.monotonic() + timeout
        while until not in self._told_of(message_id, deadline)["content"].get("text", ""):
            pass
        return message_id

    def reply(self, message_id: str, timeout: float = 20.0) -> dict[str, Any]:
        """Return the content of the reply to a cell."""
        deadline = time.monotonic() + timeout
        while True:
            message = self._next(self.client.get_shell_msg, deadline)
            if message["parent_header"].get("msg_id") == message_id:
                content: dict[str, Any] = message["content"]
                return content

    def _told_of(self, message_id: str, deadline: float) -> dict[str, Any]:
        while True:
            message = self._next(self.client.get_iopub_msg, deadline)
            if message["parent_header"].get("msg_id") == message_id:
                return message

    def _next(self, get: Any, deadline: float) -> dict[str, Any]:
        try:
            message: dict[str, Any] = self.do(get(timeout=max(0.1, deadline - time.monotonic())))
        except queue.Empty:
            raise TimeoutError("the kernel did not say what was waited for") from None
        return message


@contextmanager
def driven(manager: KernelManager, *, start: bool = True, **kwargs: Any) -> Iterator[Driven]:
    """Drive a kernel until the end of the block.

    Args:
        manager: Blocking or async.
        start: Start the kernel at once.
        kwargs: For `start_kernel`.
    """
    loop = asyncio.new_event_loop() if inspect.iscoroutinefunction(type(manager).start_kernel) else None
    kernel = Driven(manager, loop)
    try:
        if start:
            kernel.start(**kwargs)
        yield kernel
    finally:
        try:
            kernel.shutdown(now=True)
        finally:
            if loop is not None:
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.close()


@contextmanager
def client_of(connection: dict[str, Any]) -> Iterator[BlockingKernelClient]:
    """A client of a kernel, however its server is."""
    client = BlockingKernelClient()
    client.load_connection_info({**connection, "key": connection["key"].encode()})
    client.start_channels()
    try:
        client.wait_for_ready(timeout=READY)
        yield client
    finally:
        client.stop_channels()
