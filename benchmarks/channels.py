"""What it costs to carry the kernel's channels inside the launcher's session, beside direct ports and `ssh -L`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contestants import Contestant
from harness import PROGRAMS, Failed, Goal, Program, Row, Series
from tunnel import Missing, Sshd

FIGURES = ("throughput", "round-trip", "execute", "channel-lag", "channel-idle", "channel-start")
WAYS = {"ours": "relay", "direct": "direct"}
CARRIED = ("shell", "iopub", "hb", "control")

LARGE = 64_000_000  # bytes of one message
MIB = 2**20
RATE = 200 * MIB  # bytes a second
ECHOES, PAUSE = 100, 0.005  # heartbeats of a sample, seconds between them


class Stage:
    """A host application whose kernels are reached by relay, directly, and through ssh, and a client.

    Args:
        work: Folder for all that is written.
    """

    def __init__(self, work: Path) -> None:
        self.folder = work / "channels"
        self.folder.mkdir(mode=0o700)
        self.hosts = [Contestant("ours", self.folder / name) for name in ("first", "second")]
        for host in self.hosts:
            blast = [sys.executable, str(PROGRAMS / "blast_kernel.py"), "{connection_file}"]
            for name, argv in ("ipykernel", host.kernels["ipykernel"]), ("blast", blast):
                for way in WAYS.values():
                    stanza = {"provisioner_name": "gp-local-provisioner", "config": {"channels": way}}
                    host.install(f"{name}-{way}", argv, stanza)
        self.host = self.hosts[0].host
        self.client = Program("client", self.folder / "client.log")
        self._sshd: Sshd | None = None

    def tunnelled(self, ports: dict[str, int]) -> dict[str, int]:
        """Return ports that lead to others through ssh.

        Raises:
            Missing: There is no openssh.
        """
        self._sshd = self._sshd or Sshd(self.folder / "ssh")
        return self._sshd.forward(ports)

    def close(self) -> None:
        self.client.close()
        if self._sshd is not None:
            self._sshd.close()
        for host in self.hosts:
            host.close()


@contextmanager
def blasts(stage: Stage, rows: list[Row]) -> Iterator[list[str]]:
    """Kernels that say what they are asked for, and a client connected by every way; yields the names of the ways."""
    ways = []
    for who, way in WAYS.items():
        stage.host.ask("start", kernel=f"blast-{way}", slot=who)
        stage.client.ask("connect", who=who, ports=stage.host.ask("ports", slot=who))
        ways.append(who)
    try:
        ports = stage.host.ask("ports", slot="direct")
        stage.client.ask("connect", who="ssh", ports=stage.tunnelled({name: ports[name] for name in CARRIED}))
        ways.append("ssh")
    except Missing as error:
        for row in rows:
            row.series.fail("ssh", str(error))
    try:
        yield ways
    finally:
        for who in ways:
            stage.client.ask("leave", who=who)
        stage.hosts[0].forget()


def throughput(stage: Stage, rounds: int) -> list[Row]:
    """One large message, each way."""
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "kernel to client (shell)": ("get", {"channel": "shell"}),
        "kernel to client (iopub)": ("get", {"channel": "iopub"}),
        "client to kernel (shell)": ("put", {}),
    }
    goal = Goal(1, of="ssh", least=True)
    rows = {way: Row(f"64 MB, {way}", "MiB/s", Series(), goal) for way in ways}
    with blasts(stage, list(rows.values())) as everybody:
        for number in range(-1, rounds):
            for way, (command, arguments) in ways.items():
                for who in everybody:
                    seconds = stage.client.ask(command, who=who, size=LARGE, **arguments)
                    if number >= 0:
                        rows[way].series.add(who, LARGE / MIB / seconds)
    for row in rows.values():
        _beside_direct(row)
    return list(rows.values())


def round_trip(stage: Stage, rounds: int) -> list[Row]:
    """Heartbeats of an idle kernel, one after the other."""
    whole = Row("heartbeat: round trip", "ms", Series())
    added = Row("heartbeat: added to direct", "ms", Series(), Goal(2, of="ssh"))
    with blasts(stage, [added]) as everybody:
        for number in range(-1, rounds):
            found = {who: 1000 * stage.client.ask("echo", who=who, count=ECHOES, pause=PAUSE) for who in everybody}
            if number < 0:
                continue
            for who, milliseconds in found.items():
                whole.series.add(who, milliseconds)
                if who != "direct":
                    added.series.add(who, milliseconds - found["direct"])
    _beside_direct(whole)
    whole.notes.append(f"a sample is the median of {ECHOES}, {1000 * PAUSE:g} ms apart")
    return [whole, added]


def execute(stage: Stage, rounds: int) -> list[Row]:
    """`1+1` in ipykernel, by a client in the host application as Jupyter Server has one."""
    row = Row("execute 1+1 (ipykernel): until reply and idle", "ms", Series(), Goal(1.15, of="direct"))
    for who, way in WAYS.items():
        stage.host.ask("start", kernel=f"ipykernel-{way}", slot=who)
    for number in range(-1, rounds):
        for who in WAYS:
            milliseconds = 1000 * stage.host.ask("execute", slot=who, count=30)
            if number >= 0:
                row.series.add(who, milliseconds)
    stage.hosts[0].forget()
    row.notes.append("client, relay and host application in one process; a sample is the median of 30")
    return [row]


def lag(stage: Stage, rounds: int, seconds: float) -> list[Row]:
    """How late the host's loop is while its process carries much, or another process does."""
    goal = Goal(5, of="bare", how="difference")
    late = {which: Row(f"event loop's lag under load, {which}", "ms", Series(), goal) for which in ("p99", "longest")}
    late["longest"].goal = None
    passed = Row("load that passed meanwhile", "MiB/s", Series())
    watching = stage.host
    carriers = {"ours": stage.hosts[0].host, "bare": stage.hosts[1].host}
    for who, carrier in carriers.items():
        carrier.ask("start", kernel="blast-relay", slot="load")
        stage.client.ask("connect", who=who, ports=carrier.ask("ports", slot="load"))
    watching.ask("start", kernel="blast-direct", slot="plain")
    stage.client.ask("connect", who="direct", ports=watching.ask("ports", slot="plain"))
    for number in range(-1, rounds):
        for who in ("ours", "bare", "direct"):
            watching.ask("watch")
            found = stage.client.ask("load", who=who, size=8 * MIB, rate=RATE, seconds=seconds)
            noticed = watching.ask("noticed")
            if number >= 0:
                passed.series.add(who, found / MIB)
                for which, row in late.items():
                    row.series.add(who, 1000 * noticed[which])
    for who in (*carriers, "direct"):
        stage.client.ask("leave", who=who)
    for host in stage.hosts:
        host.forget()
    late["p99"].notes.append("bare: the same load through the relay of another process; direct: through none")
    return [*late.values(), passed]


def idle(stage: Stage, kernels: int, seconds: float) -> list[Row]:
    """Relayed kernels with connected clients that say nothing."""
    row = Row(f"{kernels} relayed idle kernels: CPU of the host process", "%", Series(), Goal(2))
    for number in range(kernels):
        stage.host.ask("start", kernel="blast-relay", slot=f"idle-{number}")
        ports = stage.host.ask("ports", slot=f"idle-{number}")
        stage.client.ask("hold", ports=[ports[name] for name in ("shell", "iopub", "stdin", "control")])
    time.sleep(3)
    before = stage.host.ask("cpu")
    time.sleep(seconds)
    row.series.add("ours", 100 * (stage.host.ask("cpu") - before) / seconds)
    row.notes.append(f"over {seconds:g} s; each has four connections of a client, and its launcher pings every 5 s")
    stage.hosts[0].forget()
    return [row]


def start(stage: Stage, rounds: int) -> list[Row]:
    """Start to ready of ipykernel, relayed and direct."""
    row = Row("start to ready (ipykernel), relay to direct", "ms", Series(), Goal(1.03, of="direct"))
    for number in range(-1, rounds):
        # who comes first changes: the one after a shutdown may meet what that left behind
        for who, way in sorted(WAYS.items(), reverse=bool(number % 2)):
            milliseconds = 1000 * stage.host.ask("start", kernel=f"ipykernel-{way}")
            stage.hosts[0].forget()
            if number >= 0:
                row.series.add(who, milliseconds)
    return [row]


def _beside_direct(row: Row) -> None:
    found = row.series.compared("ours", "direct", lambda mine, other: mine / other)
    if found:
        row.notes.append(f"{row.figure}: {found.median:.2f} x direct ({found.p10:.2f} - {found.p90:.2f})")


def measure(work: Path, wanted: set[str], quick: bool) -> list[Row]:
    """Measure those of `FIGURES` that are wanted."""
    steps: dict[str, Callable[[], list[Row]]] = {
        "throughput": lambda: throughput(stage, 3 if quick else 9),
        "round-trip": lambda: round_trip(stage, 3 if quick else 9),
        "execute": lambda: execute(stage, 3 if quick else 9),
        "channel-lag": lambda: lag(stage, 3 if quick else 7, 4),
        "channel-idle": lambda: idle(stage, 100, 10 if quick else 40),
        "channel-start": lambda: start(stage, 4 if quick else 20),
    }
    rows: list[Row] = []
    stage = Stage(work)
    try:
        for name in FIGURES:
            if name in wanted:
                try:
                    rows += steps[name]()
                except Failed as error:
                    print(f"{name} cannot be measured: {error}", file=sys.stderr)
                    for host in stage.hosts:
                        host.forget()
    finally:
        stage.close()
    return rows
