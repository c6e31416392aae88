"""The one background event loop of the process, where all backends and launcher sessions live.

The host application's own loop never waits for a platform: it awaits a future that this loop completes. Everything is
started at first use, again in a forked child, and ends with the process.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import logging
import os
import queue
import subprocess
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast

from .errors import BackendError

T = TypeVar("T")
P = ParamSpec("P")
log = logging.getLogger(__name__)

WORKERS = 8  # threads for blocking client libraries
MOST_WORKERS = 64
GOODBYE = 10.0  # seconds that the end of the process waits for clean-ups


class Runtime:
    """A daemon thread with an event loop, and daemon worker threads for blocking calls.

    Daemon threads and not an executor: executors refuse work in ``atexit``, where ``jupyter run`` shuts kernels down,
    and no thread can be started there; so some of them start here. More come when all are busy, so that a platform
    that hangs delays nothing but itself.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        # never the host application's choice of loop (uvloop): its policy lacks what we use, and a selector is enough
        self.loop = asyncio.SelectorEventLoop()
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.at_exit: list[Callable[[], Coroutine[Any, Any, None]]] = []
        threading.Thread(target=self._run, name="gp-runtime", daemon=True).start()
        self._workers = self._busy = 0
        for _ in range(WORKERS):
            self._add_worker()
        atexit.register(self._goodbye)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def _add_worker(self) -> None:
        with contextlib.suppress(RuntimeError):  # at the end of the process: those that are there have to do
            threading.Thread(target=self._work, name=f"gp-worker-{self._workers}", daemon=True).start()
            self._workers += 1

    def _work(self) -> None:
        while True:
            self._jobs.get()()

    async def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the background loop and await its result from any other loop.

        Cancelling the caller cancels the work; its clean-up goes on in the background.
        """
        if asyncio.get_running_loop() is self.loop:
            return await work
        return await asyncio.wrap_future(self.submit(work))

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine on the background loop from any thread."""
        return asyncio.run_coroutine_threadsafe(self._kept(work), self.loop)

    async def _kept(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await work
        finally:
            self._tasks.discard(task)

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Start a task on the background loop from code that runs there; errors are logged."""

        async def logged() -> None:
            try:
                await work
            except Exception:
                log.exception("%s failed", name)

        task = self.loop.create_task(logged(), name=name)
        task.add_done_callback(lambda _: work.close())  # cancelled before it began, it would never be awaited
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def blocking(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a blocking function on a worker thread."""
        self._busy += 1
        if self._workers < min(self._busy, MOST_WORKERS):
            self._add_worker()
        job, done = self._job(partial(function, *args, **kwargs), self._idle)
        self._jobs.put(job)
        return await done

    def apart(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Call a function that blocks for very long on a thread of its own, so that no worker is lost to it.

        It ends with the process, wherever it is then; not for the end of the process, when no thread can be started.
        """
        job, done = self._job(partial(function, *args, **kwargs))
        threading.Thread(target=job, name="gp-apart", daemon=True).start()
        return done

    def _idle(self) -> None:
        self._busy -= 1

    def _job(
        self, function: Callable[[], T], after: Callable[[], None] = lambda: None
    ) -> tuple[Callable[[], None], asyncio.Future[T]]:
        done: asyncio.Future[T] = self.loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            after()
            if done.cancelled():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(cast("T", result))

        def job() -> None:
            result, error = None, None
            try:
                result = function()
            except Exception as caught:
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop may be gone at the very end of the process
                self.loop.call_soon_threadsafe(settle, result, error)

        return job, done

    def _goodbye(self) -> None:
        if os.getpid() != self.pid:
            return
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(self._finish(), self.loop).result(GOODBYE)

    async def _finish(self) -> None:
        await asyncio.gather(*(last() for last in self.at_exit), return_exceptions=True)
        last = [task for task in self._tasks if task.get_name().startswith(("clean-up", "record"))]
        if last:
            await asyncio.wait(last)


_current: Runtime | None = None
_lock = threading.Lock()


def runtime() -> Runtime:
    """Return the runtime of this process, started at first use; a forked child gets its own."""
    global _current, _lock
    if _current is not None and _current.pid == os.getpid():
        return _current
    if _current is not None:
        _lock = threading.Lock()  # a fork may have copied it locked
    with _lock:
        if _current is None or _current.pid != os.getpid():
            _current = Runtime()
        return _current


async def blocking(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a blocking function of a client library on a worker thread, from a backend's method."""
    return await runtime().blocking(function, *args, **kwargs)


def stop_listening(server: asyncio.Server) -> None:
    """Close a server once the connections that it has accepted have become transports, in the next turn of its loop.

    `asyncio.Server.close` forgets those and leaves their sockets to the garbage collector (cpython's gh-109564): it
    happens whenever a client redials just then.

    Args:
        server: Of the loop that runs; it accepts no connection any more.
    """
    loop = server.get_loop()
    for listener in server.sockets:
        loop.remove_reader(listener.fileno())
    loop.call_soon(server.close)


async def within(seconds: float, work: Awaitable[T]) -> T:
    """Wait for something, and not for longer.

    Unlike `asyncio.wait_for` before Python 3.12 it never takes a result for a cancellation of the caller that comes at
    the same moment.

    Args:
        seconds: Until the work is cancelled.
        work: To wait for.

    Raises:
        asyncio.TimeoutError: It was not done in time.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    finally:
        if not task.done():
            task.cancel()
    if not done:
        raise asyncio.TimeoutError
    return task.result()


@dataclass(frozen=True)
class Completed:
    """A command that has ended: its exit code and what it wrote to standard output and error."""

    code: int
    output: str


async def run_command(
    *argv: str,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    timeout: float = 60.0,
) -> Completed:
    """Run a command on this machine and wait for its end, from a backend's method.

    Args:
        argv: The command, not interpreted by a shell.
        stdin: Text for its standard input.
        env: Variables on top of this process's environment.
        cwd: Working directory.
        timeout: Seconds until it is killed.

    Raises:
        BackendError: It cannot be started or did not end in time.
    """

    def run() -> Completed:
        done = subprocess.run(
            argv,
            input=stdin,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            timeout=timeout,
            check=False,
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return Completed(done.returncode, done.stdout)

    try:
        return await blocking(run)
    except subprocess.TimeoutExpired:
        raise BackendError(f"{argv[0]} did not end within {timeout:g} s") from None
    except OSError as error:
        raise BackendError(f"{argv[0]} cannot be run: {error.strerror}") from None
