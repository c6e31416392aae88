"""How late an event loop is."""

from __future__ import annotations

import asyncio
import math

INTERVAL = 0.002  # seconds


class Ticker:
    """Wants to run every 2 ms and notes how much later it does.

    A loop that is blocked for 100 ms lets fifty ticks wait, not one: each of them counts with the time that it waited,
    as requests would that come in meanwhile.
    """

    def __init__(self) -> None:
        self._late: list[float] = []
        self._loop = asyncio.get_running_loop()
        self._due = self._loop.time() + INTERVAL
        self._timer = self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        while self._due <= now:
            self._late.append(now - self._due)
            self._due += INTERVAL
        self._timer = self._loop.call_at(self._due, self._tick)

    def stop(self) -> dict[str, float]:
        """Return median, 99th percentile and longest delay in seconds."""
        self._timer.cancel()
        late = sorted(self._late) or [math.nan]
        return {"p50": late[len(late) // 2], "p99": late[int(len(late) * 0.99)], "longest": late[-1]}
