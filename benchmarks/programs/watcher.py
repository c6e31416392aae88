"""A process without us: its event loop does nothing but notice how late it is."""

from __future__ import annotations

import asyncio
import time

from lines import serve
from ticker import Ticker

tickers: list[Ticker] = []


async def start() -> None:
    tickers.append(Ticker())


async def stop() -> dict[str, float]:
    return tickers.pop().stop()


async def cpu() -> float:
    return time.process_time()


asyncio.run(serve({"start": start, "stop": stop, "cpu": cpu}))
