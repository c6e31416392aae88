"""Let the launchers of this machine through a few at a time.

More than a few for every processor start no kernel earlier: they share the processors, so that the first one is ready
when the last one is, and the host application's loop waits for its turn among them all.
"""

from __future__ import annotations

import asyncio
import contextlib
import os

from .runtime import runtime

PER_PROCESSOR = 4
PATIENCE = 1.0  # seconds until a launcher that does not call back lets others pass


class Gate:
    """Holds back starts on this machine while others begin.

    Args:
        width: How many may begin at a time; default: by the number of processors.
    """

    def __init__(self, width: int | None = None) -> None:
        self._free = asyncio.Semaphore(width or PER_PROCESSOR * (os.cpu_count() or 1))

    async def enter(self, begun: asyncio.Event) -> None:
        """Wait for a place; it is free again when ``begun`` is set, or after a second."""
        await self._free.acquire()
        runtime().spawn(self._leave(begun), name="gate")

    async def _leave(self, begun: asyncio.Event) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(begun.wait(), PATIENCE)
        self._free.release()
