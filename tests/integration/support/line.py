"""A wire between launchers and a server in another process, which can be cut as a cable is pulled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

SERVER = "127.0.0.2"
LINE = "127.0.0.3"
"""Two addresses of the loopback with the same port, so that a server can advertise the line as its own address."""


class Line:
    """Listens where launchers dial, and carries what they say to where the server listens.

    While it is cut, what is sent over it is lost, and neither end is told. Connections that lived then never carry
    anything again, and new ones are not answered; all of them break when the line is mended.
    """

    def __init__(self) -> None:
        self.port = 0
        self.is_cut = False
        self.ends: set[End] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="line")

    @property
    def env(self) -> dict[str, str]:
        """Variables of the server whose launchers use this line."""
        return {
            "GP_BIND_IP": SERVER,
            "GP_RESPONSE_IP": LINE,
            "GP_RESPONSE_PORT": str(self.port),
            "GP_RESPONSE_PORT_RETRIES": "0",
        }

    @contextmanager
    def opened(self) -> Iterator[Line]:
        """Carry until the end of the block."""
        self._thread.start()
        try:
            self._do(self._open())
            yield self
        finally:
            self._do(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def cut(self) -> None:
        """Carry nothing from now on."""
        self.is_cut = True

    def mend(self) -> None:
        """Break what was there when it was cut, and carry new connections."""
        self._do(self._mend())

    def _do(self, what: object) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(10)  # type: ignore[arg-type]

    async def _open(self) -> None:
        self._server = await self._loop.create_server(lambda: End(self), LINE, 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _mend(self) -> None:
        self.is_cut = False
        for end in list(self.ends):
            end.transport.abort()

    async def _close(self) -> None:
        self._server.close()
        await self._mend()
        while self.ends:
            await asyncio.sleep(0.01)


class End(asyncio.Protocol):
    """One end of a connection.

    Args:
        line: Whose.
        other: The other end; None: a launcher dials, and the server is to be called.
    """

    def __init__(self, line: Line, other: End | None = None) -> None:
        self.line = line
        self.other = other
        self._calling: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.line.ends.add(self)
        if self.other is not None:
            self.other.other = self
        elif not self.line.is_cut:
            self.transport.pause_reading()
            self._calling = asyncio.ensure_future(self._call())

    async def _call(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: End(self.line, self), SERVER, self.line.port)
            self.transport.resume_reading()
        except OSError:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.other is not None and not self.line.is_cut:
            self.other.transport.write(data)

    def pause_writing(self) -> None:
        if self.other is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None:
            self.other.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self.line.ends.discard(self)
        if self.other is not None and not self.line.is_cut:
            self.other.transport.close()
