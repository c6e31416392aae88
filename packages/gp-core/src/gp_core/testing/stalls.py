"""Find out what blocks an event loop, and tell a blocked loop from a busy machine."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

TICK = 0.01  # seconds between two looks


@dataclass(frozen=True)
class Stall:
    """One callback that kept the loop from all others.

    Args:
        seconds: How long it had been running when it was last seen.
        stack: Where it was then, innermost call last.
    """

    seconds: float
    stack: str

    def __str__(self) -> str:
        return f"the event loop was blocked for at least {self.seconds:.3f} s by\n{self.stack}"


class StallDetector:
    """A context manager that looks at the thread of an event loop from a thread of its own.

    A stall is one callback, or one step of a task, that runs for longer than the threshold. Time in which the loop's
    thread waited for a processor, or the detector itself was late, is nobody's fault and does not count.

    Args:
        thread: The thread that runs the loop.
        threshold: Seconds.
    """

    def __init__(self, thread: threading.Thread, threshold: float = 0.1) -> None:
        self.stalls: list[Stall] = []
        self._watched = thread
        self._threshold = threshold
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stall-detector", daemon=True)

    @classmethod
    def of_runtime(cls, threshold: float = 0.1) -> StallDetector:
        """Return a detector for the loop that backends run on."""
        from ..runtime import runtime

        runtime()
        [thread] = [thread for thread in threading.enumerate() if thread.name == "gp-runtime"]
        return cls(thread, threshold)

    def __enter__(self) -> StallDetector:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        callback: FrameType | None = None
        charged, last, (used, queued), found = 0.0, time.monotonic(), self._times(), False
        while not self._stop.wait(TICK):
            now, (cpu, waiting) = time.monotonic(), self._times()
            # at most two ticks: if this thread was late, so may have been the other one; computing counts in any case
            step = max(min(now - last, 2 * TICK) - (waiting - queued), cpu - used, 0.0)
            last, used, queued = now, cpu, waiting
            frame = sys._current_frames().get(self._watched.ident or 0)
            current = _callback(frame)
            if current is None or current is not callback:
                callback, charged, found = current, 0.0, False
                continue
            charged += step
            if charged >= self._threshold:
                stall = Stall(charged, _below(frame, current))
                if found:
                    self.stalls.pop()  # the same one, seen for longer
                self.stalls.append(stall)
                found = True
            del frame

    def _times(self) -> tuple[float, float]:
        """Return the seconds that the watched thread has computed, and waited for a processor, if the system tells."""
        with contextlib.suppress(OSError, ValueError):
            text = Path(f"/proc/self/task/{self._watched.native_id}/schedstat").read_text()
            computed, waited, _ = text.split()
            return int(computed) / 1e9, int(waited) / 1e9
        return 0.0, 0.0


_RUN_CALLBACK = asyncio.Handle._run.__code__


def _callback(frame: FrameType | None) -> FrameType | None:
    while frame is not None and frame.f_code is not _RUN_CALLBACK:
        frame = frame.f_back
    return frame


def _below(frame: FrameType | None, outermost: FrameType) -> str:
    stack = traceback.extract_stack(frame)
    depth = 0
    while frame is not None and frame is not outermost:
        depth, frame = depth + 1, frame.f_back
    return "".join(traceback.format_list(stack[-depth:] if depth else stack))
