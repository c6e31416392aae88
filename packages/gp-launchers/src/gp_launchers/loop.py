"""The one thread's event loop: descriptors, timers, signals and results of helper threads.

Whatever a session carries later - the kernel's channels, say - is one more `watch` here.
"""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE


class Timer:
    """A call in the future.

    Args:
        when: Time of `time.monotonic`.
        callback: Called without arguments.
    """

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callable[[], object]) -> None:
        self.when = when
        self.callback: Callable[[], object] | None = callback


class Loop:
    """Runs callbacks until `stop`; sleeps without waking up when there is nothing to do."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._watched: dict[int, tuple[int, Callable[[int], object]]] = {}
        self._timers: set[Timer] = set()
        self._results: deque[Callable[[], object]] = deque()
        self._signals: dict[int, Callable[[], object]] = {}
        self._code: int | None = None
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self.watch(self._wake_read, READ, self._woken)

    def watch(self, descriptor: int, events: int, callback: Callable[[int], object]) -> None:
        """Call back with the ready events of a descriptor; replaces what was said of it before."""
        before, wanted = self._watched.get(descriptor), (events, callback)
        if before == wanted:
            return
        if before is None:
            self._selector.register(descriptor, events, callback)
        else:
            self._selector.modify(descriptor, events, callback)
        self._watched[descriptor] = wanted

    def unwatch(self, descriptor: int) -> None:
        """Forget a descriptor; safe to repeat."""
        if self._watched.pop(descriptor, None) is not None:
            self._selector.unregister(descriptor)

    def after(self, seconds: float, callback: Callable[[], object]) -> Timer:
        """Call back once, after some seconds; the timer may be given to `cancel`."""
        timer = Timer(time.monotonic() + seconds, callback)
        self._timers.add(timer)
        return timer

    def cancel(self, timer: Timer | None) -> None:
        """Do not call back; safe to repeat."""
        if timer is not None:
            timer.callback = None
            self._timers.discard(timer)

    def on_signal(self, number: int, callback: Callable[[], object]) -> None:
        """Call back, from the loop, when the process gets a signal."""
        self._signals[number] = callback
        signal.signal(number, _noted)

    def from_thread(self, callback: Callable[[], object]) -> None:
        """Call back from the loop; the only method that another thread may use."""
        self._results.append(callback)
        try:
            os.write(self._wake_write, b"\0")
        except OSError:
            pass  # full: it wakes up anyway

    def stop(self, code: int) -> None:
        """Let `run` return with a code."""
        if self._code is None:
            self._code = code

    def run(self) -> int:
        """Run until `stop` and return its code."""
        while self._code is None:
            timeout = None
            if self._timers:
                timeout = max(0.0, min(timer.when for timer in self._timers) - time.monotonic())
            for key, events in self._selector.select(timeout):
                # An earlier callback of this round may have closed the descriptor or given it to somebody else.
                current = self._watched.get(key.fd)
                if current is not None and current[1] == key.data:
                    key.data(events)
            now = time.monotonic()
            for timer in [timer for timer in self._timers if timer.when <= now]:
                callback = timer.callback
                self.cancel(timer)
                if callback is not None:
                    callback()
        return self._code

    def _woken(self, _events: int) -> None:
        try:
            numbers = os.read(self._wake_read, 4096)
        except BlockingIOError:
            return
        for number in sorted(set(numbers)):
            if number in self._signals:
                self._signals[number]()
        while self._results:
            self._results.popleft()()


def _noted(_number: int, _frame: object) -> None:
    """A handler has to exist; the wake-up descriptor tells the loop."""
