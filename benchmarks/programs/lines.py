"""One command in, one answer out, as lines of JSON: how the runner talks to the processes that it measures."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

Command = Callable[..., Awaitable[Any]]


async def serve(commands: dict[str, Command]) -> None:
    """Answer commands until standard input ends."""
    # what we start inherits 1: it gets the log instead of the conversation
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    loop = asyncio.get_running_loop()
    requests = asyncio.StreamReader(limit=1 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(requests), sys.stdin)
    while line := await requests.readline():
        asked = json.loads(line)
        try:
            answer = {"ok": await commands[asked.pop("do")](**asked)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
