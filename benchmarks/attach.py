"""Launcher sessions in numbers: how fast they are accepted, what a thousand of them cost."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import Goal, Program, Row, Series

AT_A_TIME = 32  # connections that one process has under way
WARM = 50
PROCESSES = max(1, min(4, (os.cpu_count() or 1) - 1))  # one core is the server's


class Meeting:
    """A server, and launchers in few processes."""

    def __init__(self, server: Program, clients: list[Program], greets: bool) -> None:
        self.server, self.clients, self.greets = server, clients, greets
        self._next = 0

    def listen(self, count: int, known: bool) -> None:
        port = self.server.ask("listen", count=count, known=known)["port"]
        for client in self.clients:
            client.ask("aim", port=port, greets=self.greets)

    def attach(self, count: int) -> dict[str, float]:
        """Attach some more launchers; sessions per second, and per second of the server's CPU."""
        before = self.server.ask("usage")
        share = count // len(self.clients)
        for client in self.clients:
            client.tell("attach", first=self._next, count=share, at_a_time=AT_A_TIME)
            self._next += share
        found = [client.answer() for client in self.clients]
        after = self.server.ask("usage")
        if any(one["failed"] for one in found):
            raise RuntimeError(f"{sum(one['failed'] for one in found)} sessions were refused or lost")
        seconds = max(one["ended"] for one in found) - min(one["began"] for one in found)
        cpu = after["cpu"] - before["cpu"]
        return {
            "rate": share * len(self.clients) / seconds,
            "cpu_rate": share * len(self.clients) / cpu,
            "busy": cpu / seconds,
            "kib": (after["rss"] - before["rss"]) / (share * len(self.clients)),
        }


@contextmanager
def meeting(work: Path, kind: str) -> Iterator[Meeting]:
    """A fresh server and fresh launchers.

    Args:
        work: Folder for logs, key and records.
        kind: "ours" or "bare".
    """
    folder = work / "attach"
    folder.mkdir(mode=0o700, exist_ok=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith("GP_")}
    env |= {"GP_DATA_DIR": str(folder), "GP_RESPONSE_PORT": "0"}
    programs = [Program("acceptor", folder / "log", env=env, arguments=[kind])]
    try:
        programs += [Program("launchers", folder / "launchers.log", env=env) for _ in range(PROCESSES)]
        yield Meeting(programs[0], programs[1:], greets=kind == "ours")
    finally:
        for program in reversed(programs):
            program.kill()  # nothing of it needs a clean-up


def attach(work: Path, rounds: int, count: int, idle: float) -> list[Row]:
    """Attach, hold, and look."""
    bare = Goal(0.7, of="bare", least=True)
    redial = Row("attach (a redial): sessions per second", "/s", Series(), bare)
    first = Row("attach (first call, recorded): sessions per second", "/s", Series(), bare)
    redial_cpu = Row("attach (a redial): sessions per second of the server's CPU", "/s", Series(), bare)
    first_cpu = Row("attach (first call): sessions per second of the server's CPU", "/s", Series(), bare)
    memory = Row(f"{count} sessions held: server memory for each", "KiB", Series(), Goal(64))
    for _ in range(rounds):
        for kind, known, rows in (
            ("ours", True, (redial, redial_cpu)),
            ("bare", True, (redial, redial_cpu)),
            ("ours", False, (first, first_cpu)),
        ):
            with meeting(work, kind) as made:
                made.listen(count + WARM * PROCESSES, known)
                made.attach(WARM * PROCESSES)
                found = made.attach(count)
            _note(rows, kind, found)
            if kind == "bare":
                _note((first, first_cpu), kind, found)
            if known:
                memory.series.add(kind, found["kib"])
    redial.notes.append(
        f"{PROCESSES} process(es) with launchers; bare: asyncio's own TLS server with the same certificate, "
        "which asks nothing"
    )
    return [redial, redial_cpu, first, first_cpu, memory, _idle(work, count, idle)]


def _note(rows: tuple[Row, Row], kind: str, found: dict[str, Any]) -> None:
    rows[0].series.add(kind, found["rate"])
    rows[1].series.add(kind, found["cpu_rate"])
    rows[0].series.add(f"{kind}_busy", found["busy"])


def _idle(work: Path, count: int, seconds: float) -> Row:
    row = Row(f"{count} sessions held: idle CPU", "%", Series(), Goal(1))
    with meeting(work, "ours") as made:
        made.listen(count, True)
        made.attach(count)
        for client in made.clients:
            client.ask("hold")
        before = made.server.ask("usage")["cpu"]
        time.sleep(seconds)
        row.series.add("ours", 100 * (made.server.ask("usage")["cpu"] - before) / seconds)
        alive = sum(client.ask("report")["sessions"] for client in made.clients)
    row.notes.append(f"over {seconds:g} s, every session pings each 30 s; {alive} of {count} were alive at the end")
    return row
