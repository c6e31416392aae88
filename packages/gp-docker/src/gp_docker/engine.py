"""One engine: what is asked of it, and what it tells by itself, for all kernels of this process."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from gp_core import BackendError, ConfigError, Status, blocking
from gp_core.runtime import runtime, within

from . import states
from .reasons import EngineUnreachable, Refused

if TYPE_CHECKING:
    from docker import APIClient

    from .connection import Endpoint

T = TypeVar("T")
log = logging.getLogger(__name__)

PATIENCE = 15.0  # seconds for an answer
MOST = 24  # calls at a time; more would take the worker threads of other engines if this one hangs
AGAIN = (0.2, 10.0)  # seconds until it is asked for events again: at first, at most
OPENED = 2.0  # seconds that nobody waits longer for the stream of events
KEPT = 16 * 1024  # bytes of output
GIVEN_UP = 600.0  # seconds that what a start has left is tried to be removed
LINGER = 60.0  # seconds that it stays open for the next one


class Changes(asyncio.Event):
    """Set whenever a container may be in another state."""

    async def next(self, seconds: float) -> None:
        """Wait for one.

        Args:
            seconds: Without any it is over then.
        """
        with contextlib.suppress(asyncio.TimeoutError):
            await within(seconds, self.wait())


class Engine:
    """One engine.

    Args:
        where: It is.
    """

    def __init__(self, where: Endpoint) -> None:
        self.where = where
        self.known: dict[Any, Any] = {}  #: answers that stay true, by what was asked
        self._connecting: asyncio.Task[APIClient] | None = None
        self._places = asyncio.Semaphore(MOST)
        self._heard_by: dict[str, set[Changes]] = {}
        self._following: asyncio.Task[None] | None = None
        self._reading: asyncio.Future[None] | None = None
        self._stream: Any = None
        self._hears = asyncio.Event()

    def __str__(self) -> str:
        return self.where.name

    async def do(
        self,
        work: Callable[[APIClient], T],
        *,
        patience: float | None = None,
        undo: Callable[[APIClient, T], object] | None = None,
    ) -> T:
        """Ask it something, on a worker thread.

        Args:
            work: Gets a client.
            patience: Seconds for its answer; default: `PATIENCE`.
            undo: Gets a client and the answer, if that comes when nobody waits for it any more.

        Raises:
            Refused: It answered with an error.
            EngineUnreachable: It did not answer.
        """
        patience = patience or PATIENCE
        try:
            return await within(patience, self._in_place(work, undo))
        except asyncio.TimeoutError:
            raise EngineUnreachable(f"engine {self} does not answer within {patience:g} s") from None

    async def _in_place(self, work: Callable[[APIClient], T], undo: Callable[[APIClient, T], object] | None) -> T:
        await self._places.acquire()
        task = asyncio.ensure_future(self._do(work))  # a thread cannot be stopped: its place is free when it has ended
        task.add_done_callback(lambda _: self._places.release())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:  # nobody waits any more
            task.add_done_callback(lambda task: self._late(task, undo))
            raise

    async def _do(self, work: Callable[[APIClient], T]) -> T:
        client = await self.connected()
        return await blocking(self.asked, work, client)

    def _late(self, task: asyncio.Task[T], undo: Callable[[APIClient, T], object] | None) -> None:
        if not task.cancelled() and task.exception() is None and undo is not None:
            made = task.result()
            runtime().spawn(self._undone(lambda client: undo(client, made)), name=f"clean-up on engine {self}")

    async def _undone(self, work: Callable[[APIClient], object]) -> None:
        with contextlib.suppress(Refused):  # it is gone
            await self.do(work, patience=60.0)

    async def connected(self) -> APIClient:
        """Return its client; the first call asks it for its version."""
        if self._connecting is None or (self._connecting.done() and self._connecting.exception() is not None):
            self._connecting = asyncio.create_task(blocking(self._connect))
        return await asyncio.shield(self._connecting)

    def _connect(self) -> APIClient:
        from .connection import connect

        try:
            return self.asked(lambda _: connect(self.where), None)
        except Refused as error:  # such as one that wants TLS
            raise EngineUnreachable(f"engine {self} does not take us: {error.said}") from None

    def asked(self, work: Callable[[Any], T], client: Any) -> T:
        """Do some work and translate the library's errors; runs on any thread but the loop's.

        Raises:
            Refused: It answered with an error.
            EngineUnreachable: It did not answer.
        """
        from docker.credentials import StoreError
        from docker.errors import APIError, DockerException, InvalidVersion
        from requests import RequestException
        from urllib3.exceptions import HTTPError

        try:
            return work(client)
        except APIError as error:
            raise Refused(error.status_code or 0, str(error.explanation or error).strip()) from None
        except InvalidVersion as error:
            raise Refused(400, f"this engine is too old: {error}") from None
        except (DockerException, RequestException, HTTPError, OSError) as error:
            if isinstance(error.__cause__, StoreError):
                raise Refused(0, str(error.__cause__)) from None  # what keeps this user's passwords
            raise EngineUnreachable(f"engine {self} does not answer: {_short(error)}") from None

    async def cached(self, key: Any, ask: Callable[[], Any]) -> Any:
        """Return an answer that stays true; those that ask at the same time share one.

        Args:
            key: Names the question.
            ask: Returns an awaitable of the answer.
        """
        known = self.known.get(key)
        if known is None or (known.done() and (known.cancelled() or known.exception() is not None)):
            known = self.known[key] = asyncio.ensure_future(ask())
        return await asyncio.shield(known)

    # -- what it tells

    @contextlib.asynccontextmanager
    async def changes(self, container: str) -> AsyncIterator[Changes]:
        """Hear of a container's events, as long as the block lasts."""
        changes = Changes()
        self._heard_by.setdefault(container, set()).add(changes)
        try:
            if self._following is None or self._following.done():
                self._following = asyncio.create_task(self._follow())
            with contextlib.suppress(asyncio.TimeoutError):
                await within(OPENED, self._hears.wait())
            yield changes
        finally:
            self._heard_by[container].discard(changes)
            if not self._heard_by[container]:
                del self._heard_by[container]

    async def _follow(self) -> None:
        """Follow its events, one stream for all kernels, while somebody wants to hear of one and some time longer."""
        pause = AGAIN[0]
        while self._heard_by:
            try:
                client = await self.connected()
            except BackendError as error:
                log.debug("%s", error)
            else:
                reading = self._reading
                if reading is None or reading.done():  # else an engine that hangs has not answered yet
                    reading = self._reading = runtime().apart(self._read, client)
                while not reading.done() and self._heard_by:
                    await asyncio.wait({reading}, timeout=LINGER)
                pause = AGAIN[0] if self._hears.is_set() else pause
                self._close_stream()
            self._wake()
            await asyncio.sleep(pause)
            pause = min(2 * pause, AGAIN[1])

    def _read(self, client: APIClient) -> None:
        """Open the stream and read it to its end; the library waits for ever for an engine that hangs."""
        call, filters = runtime().loop.call_soon_threadsafe, {"type": "container", "label": "kernel_id"}
        with contextlib.suppress(Exception):  # the end of the stream, whatever it looks like
            stream = client.events(decode=True, filters=filters)
            call(self._opened, stream)
            for event in stream:
                call(self._heard, event)

    def _opened(self, stream: Any) -> None:
        self._stream = stream
        if self._following is None or self._following.done():
            self._close_stream()  # too late
            return
        self._hears.set()
        self._wake()  # what came in between is asked for

    def _close_stream(self) -> None:
        self._hears.clear()
        if self._stream is not None:
            with contextlib.suppress(Exception):  # not every transport can be closed from here
                self._stream.close()
            self._stream = self._reading = None

    def _heard(self, event: dict[str, Any]) -> None:
        for changes in self._heard_by.get(str((event.get("Actor") or {}).get("ID")), ()):
            changes.set()

    def _wake(self) -> None:
        for every in self._heard_by.values():
            for changes in every:
                changes.set()

    # -- containers

    async def status(self, container: str) -> Status:
        """Look at a container.

        Raises:
            EngineUnreachable: It does not answer.
        """
        try:
            return states.status_of(await self.do(lambda client: client.inspect_container(container)))
        except Refused as error:
            if error.status != 404:
                raise
            return states.gone(None)

    async def remove(self, container: str) -> None:
        """Kill and remove a container with its anonymous volumes; one that is gone is fine."""
        try:
            await self.do(lambda client: client.remove_container(container, v=True, force=True), patience=60.0)
        except Refused as error:
            if error.status not in (404, 409):  # 409: somebody does it at this moment
                raise

    async def remove_all(self, label: str) -> None:
        """Remove every container that has a label; an engine that does not answer is asked again for a while.

        Args:
            label: ``NAME=VALUE``.
        """
        deadline, pause = time.monotonic() + GIVEN_UP, AGAIN[0]
        while True:
            try:
                for one in await self.do(lambda client: client.containers(all=True, filters={"label": label})):
                    await self.remove(one["Id"])
                return
            except BackendError:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, AGAIN[1])

    async def remove_stale(self, label: str, seconds: float) -> None:
        """Remove containers that a process has left that was killed: they are there, and still are some time later.

        Args:
            label: That they have.
            seconds: Which no other process needs one for.
        """

        async def there() -> set[str]:
            return {one["Id"] for one in await self.do(lambda client: client.containers(all=True, filters=wanted))}

        wanted = {"label": label}
        if before := await there():
            await asyncio.sleep(seconds)
            for left in before & await there():
                await self.remove(left)


def last_of(pieces: Iterable[bytes]) -> str:
    """Return the end of some output; it may be long, and in one line."""
    kept = b""
    for piece in pieces:
        kept = (kept + piece)[-KEPT:]
    return kept.decode("utf-8", "replace")


def _short(error: BaseException) -> str:
    """Return what is at the bottom of an error of the library, which wraps several."""
    inner: BaseException | None = error
    while inner is not None:
        error = inner
        inner = next((one for one in (getattr(error, "reason", None), *error.args) if isinstance(one, Exception)), None)
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text if len(text) < 300 else f"{text[:300]}..."


@functools.cache
def _engines(pid: int) -> dict[tuple[str, str, bool], Engine]:
    return {}


async def engine(name: str) -> Engine:
    """Return an engine of this process, the same one each time; a forked process begins anew.

    Args:
        name: See `connection.endpoint`.

    Raises:
        ConfigError: There is no such context.
    """
    where = await blocking(_endpoint, name)
    every, key = _engines(os.getpid()), (where.name, where.url, where.tls is not None)
    if key not in every:
        every[key] = Engine(where)
    return every[key]


def _endpoint(name: str) -> Endpoint:
    try:
        from .connection import endpoint
    except ImportError as error:  # the docker package of another version
        raise ConfigError(f"the docker library cannot be used: {error}") from None
    return endpoint(name)
