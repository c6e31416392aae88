"""Find a server: goes round the addresses, with backoff and jitter between the rounds."""

from __future__ import annotations

import os
import socket

from .session import DEADLINE, Session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Sequence

    from .log import Log
    from .loop import Loop, Timer

FIRST_PAUSE = 0.2  # seconds; doubled after every round
LONGEST_PAUSE = 15.0


class Dialer:
    """Dials one address after the other until a session is accepted.

    Args:
        loop: Runs it.
        addresses: ``(host, port)`` of the servers.
        connect: Makes an unopened session for a family and a socket address.
        on_refused: Told when nobody of ours was at any address of a round.
        log: Takes every change of what goes wrong.
    """

    def __init__(
        self,
        loop: Loop,
        addresses: Sequence[tuple[str, int]],
        connect: Callable[[tuple[int, Any]], Session],
        on_refused: Callable[[], object],
        log: Log,
    ) -> None:
        self.session: Session | None = None
        self._loop = loop
        self._addresses = addresses
        self._connect = connect
        self._on_refused = on_refused
        self._log = log
        self._pause = FIRST_PAUSE
        self._timer: Timer | None = None
        self._hosts: list[tuple[str, int]] = []
        self._targets: list[tuple[int, Any]] = []
        self._all_refused = False
        self._lookups: dict[str, int] = {}  # hosts with a thread of their own that waits for the resolver
        self._last_text = ""

    def round(self) -> None:
        """Begin at the first address."""
        self._loop.cancel(self._timer)
        self._hosts = list(self._addresses)
        self._targets = []
        self._all_refused = True
        self._next()

    def failed(self, where: str, why: str, refused: bool) -> None:
        """Go on to the next address after an attempt, or a session, came to nothing."""
        self.session = None
        self._all_refused = self._all_refused and refused
        text = f"{where}: {why}"
        if text != self._last_text:  # one line a day, not one every fifteen seconds
            self._log("no session with %s", text)
            self._last_text = text
        self._next()

    def lost(self) -> None:
        """Begin again after an accepted session."""
        self.session = None
        self._last_text = ""
        self._wait()

    def reset(self) -> None:
        """Forget the backoff: a session has proved itself."""
        self._pause = FIRST_PAUSE

    def stop(self) -> None:
        """Do not dial any more."""
        self._loop.cancel(self._timer)
        self._hosts = []
        self._targets = []

    def _wait(self) -> None:
        jitter = int.from_bytes(os.urandom(4), "big") / 2.0**32
        self._loop.cancel(self._timer)
        self._timer = self._loop.after(self._pause * jitter, self.round)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _next(self) -> None:
        if self._targets:
            self.session = self._connect(self._targets.pop(0))
            self.session.open()
        elif self._hosts:
            host, port = self._hosts.pop(0)
            target = _literal(host, port)
            if target:
                self._targets = [target]
                self._next()
            else:
                self._look_up(host, port)
        else:
            if self._all_refused:
                self._on_refused()
            self._wait()

    def _look_up(self, host: str, port: int) -> None:
        late = self._loop.after(DEADLINE, lambda: found(f"no answer from the resolver within {DEADLINE:g} s", []))
        waiting = [True]

        def found(why: str, targets: list[tuple[int, Any]]) -> None:
            if not waiting:
                return  # too late: the round has gone on
            waiting.clear()
            self._loop.cancel(late)
            if targets:
                self._targets = targets
                self._next()
            else:
                self.failed(host, why, False)

        if host in self._lookups:  # the last thread still waits; another one would wait as long
            return
        self._lookups[host] = port
        import _thread

        try:
            _thread.start_new_thread(self._resolve, (host, port, found))
        except RuntimeError as error:  # the kernel may have all that this user can have
            del self._lookups[host]
            why = f"cannot look it up: {error}"
            self._loop.after(0, lambda: found(why, []))

    def _resolve(self, host: str, port: int, found: Callable[[str, list[tuple[int, Any]]], None]) -> None:
        targets: list[tuple[int, Any]] = []
        why = "no address"
        try:
            answers = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
            targets = [(int(family), target) for family, _, _, _, target in answers]
        except (OSError, UnicodeError) as error:
            why = f"cannot look it up: {error}"

        def done() -> None:
            self._lookups.pop(host, None)
            found(why, targets)

        self._loop.from_thread(done)


def _literal(host: str, port: int) -> tuple[int, Any] | None:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
            return (int(family), (host, port) if family == socket.AF_INET else (host, port, 0, 0))
        except OSError:
            pass
    return None
