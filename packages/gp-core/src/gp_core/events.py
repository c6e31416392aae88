"""What ``gp_kernel_event`` tells of a kernel's life."""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .runtime import runtime

if TYPE_CHECKING:
    from .backend import KernelInfo


class Event(enum.Enum):
    """The events of a kernel's life, in the order in which most kernels meet them."""

    LAUNCHING = "launching"  #: policy is content, the record is written, the backend is asked
    LAUNCHED = "launched"  #: the backend has a job
    PROGRESS = "progress"  #: the platform said something new about the starting job
    CONNECTED = "connected"  #: the launcher has called back
    LISTENING = "listening"  #: the kernel's sockets accept: it can be used
    FAILED = "failed"  #: the start was given up, and what was started is removed
    LOST = "lost"  #: the launcher session broke; the kernel is taken for alive
    RESUMED = "resumed"  #: the launcher has called back again
    DROPPED = "dropped"  #: output was left out, because nobody took it for too long
    ADOPTED = "adopted"  #: the kernel of a server that is gone is used through this one from now on
    RESTARTING = "restarting"  #: the kernel is being replaced inside its launcher
    EXITED = "exited"  #: the kernel's process has ended
    GONE = "gone"  #: the platform says why the job of a kernel is gone whose launcher had only told of its end
    REMOVED = "removed"  #: job and record are gone


ROUTINE = frozenset(Event) - {
    Event.FAILED,
    Event.LOST,
    Event.RESUMED,
    Event.ADOPTED,
    Event.EXITED,
    Event.GONE,
    Event.DROPPED,
}
"""Logged as DEBUG: the host application tells of starts itself, and a console prints its log between the cells."""


@dataclass(frozen=True, kw_only=True)
class KernelEvent:
    """One event of a kernel's life; holds no secret.

    Args:
        event: What happened.
        detail: One line for people.
        data: JSON-able details, such as ``host``, ``exit_code`` or ``reason``.
        time: Seconds since the epoch.
    """

    event: Event
    detail: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)


class Announcer:
    """Tells plugins and the log of one kernel's events, in order; a slow plugin delays nothing but later events.

    Args:
        kernel: Whose events they are.
        log: Of the host application, where its operator reads.
        tell_plugins: Tells every plugin of an event.
        heard: Whether any plugin listens; a task for every event of every kernel costs the process something.
    """

    def __init__(
        self,
        kernel: KernelInfo,
        log: logging.Logger,
        tell_plugins: Callable[[KernelInfo, KernelEvent], Awaitable[None]],
        heard: Callable[[], bool] = lambda: True,
    ) -> None:
        self._kernel = kernel
        self._log = log
        self._tell_plugins = tell_plugins
        self._heard = heard
        self._last: asyncio.Task[None] | None = None

    def tell(self, event: KernelEvent) -> None:
        """Announce an event and return at once."""
        level = logging.DEBUG if event.event in ROUTINE else logging.INFO
        self._log.log(level, "kernel %s: %s", self._kernel.kernel_id, f"{event.event.value} {event.detail}".rstrip())
        if not self._heard():
            return
        before = self._last

        async def told() -> None:
            if before is not None:
                await asyncio.wait({before})
            await self._tell_plugins(self._kernel, event)

        self._last = runtime().spawn(told(), name="event")
