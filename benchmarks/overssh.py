"""Kernels on another host over ssh: ours, the peer's, and local ones; the host is in namespaces of this machine."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from contestants import Contestant
from harness import Failed, Goal, Program, Row, Series
from starts import life

sys.path.append(str(Path(__file__).parents[1] / "tests/integration"))
from clusters.availability import Unavailable
from clusters.hosts import SshHosts
from clusters.sshd import Sshd
from clusters.wan import Link

STEPS = {"ssh-start": "start", "ssh-interrupt": "interrupt", "ssh-restart": "restart", "ssh-shutdown": "shutdown"}
FIGURES = (*STEPS, "ssh-first", "ssh-crowd", "ssh-watch", "ssh-far")
COUNT, WATCHED = 50, 200
PATIENCE = 120.0  # seconds for many starts
RTT = 0.1  # seconds


class Stage:
    """A host, and contestants that start kernels on it.

    Args:
        work: Folder for all that is written.
        peer: Whether the peer takes part.

    Raises:
        Unavailable: There can be no such host here.
    """

    def __init__(self, work: Path, *, peer: bool) -> None:
        self.folder = work / "ssh"
        self.folder.mkdir()
        self.cluster = SshHosts("")
        self.contestants: list[Contestant] = []
        try:
            self.cluster.up()
            for name in ("ours", "local", *(["peer"] if peer else [])):
                self.contestants.append(self.contestant(name, self.folder))
        except BaseException:
            self.close()
            raise

    def contestant(self, name: str, work: Path, **config: Any) -> Contestant:
        """Make one; options are for our kernelspecs."""
        host = self.cluster["h1"]
        far: dict[str, Any] = {"provisioner_name": "distributed-provisioner"}
        if name == "ours":
            stanza = {**far, "config": {"remote_hosts": ["h1"], **config}}
            env = {"GP_SSH_CONFIG": str(self.cluster.config), "GP_RESPONSE_IP": host.near}
            return Contestant(name, work, stanza, env)
        if name == "peer":  # it looks where ssh looks by itself
            home = work / "home/.ssh"
            home.mkdir(parents=True)
            shutil.copy(self.cluster.folder / "id", home / "id_ed25519")
            shutil.copy(self.cluster.folder / "known_hosts", home / "known_hosts")
            env = {"HOME": str(home.parent), "GP_REMOTE_USER": "root", "GP_RESPONSE_IP": host.near}
            # its log is there as here
            return Contestant(name, work, {**far, "config": {"remote_hosts": [host.address]}}, env)
        return Contestant(name, work)

    def named(self, *names: str) -> list[Contestant]:
        """Return some of the contestants."""
        return [contestant for contestant in self.contestants if contestant.name in names]

    def sweep(self) -> None:
        """End what the peer has left on the host, which has its own process numbers."""
        self.cluster["h1"].inside("pkill", "-KILL", "-f", "launch_ipykernel|instant_peer", check=False)

    def close(self) -> None:
        """End it; nothing remains."""
        for contestant in self.contestants:
            contestant.close()
        self.cluster.down()


def measure(work: Path, wanted: set[str], *, quick: bool, peer: bool) -> list[Row]:
    """Measure what is wanted."""
    try:
        stage = Stage(work, peer=peer)
    except Unavailable as reason:
        row = Row("kernels over ssh", "ms", Series())
        row.series.fail("ours", str(reason))
        return [row]
    try:
        rows: list[Row] = []
        if steps := {step for name, step in STEPS.items() if name in wanted}:
            rows += _life(stage, steps, 3 if quick else 11)
        if "ssh-first" in wanted:
            rows += _first(stage, 2 if quick else 7)
        if "ssh-crowd" in wanted:
            rows += _crowd(stage, 2 if quick else 5)
        if "ssh-watch" in wanted:
            rows += _watch(stage, 50 if quick else WATCHED, 10 if quick else 40)
        if "ssh-far" in wanted:
            rows += _far(stage.folder, 2 if quick else 7)
        return rows
    finally:
        stage.close()


def _life(stage: Stage, steps: set[str], rounds: int) -> list[Row]:
    rows = {
        "start": Row("over ssh: start to ready", "ms", Series(), Goal(1.25, of="local")),
        "interrupt": Row("over ssh: interrupt", "ms", Series(), Goal(1.2, of="local")),
        "restart": Row("over ssh: restart", "ms", Series(), Goal(1.2, of="local")),
        "shutdown": Row("over ssh: shutdown", "ms", Series(), Goal(1.5, of="local")),
    }
    told = life(stage.contestants, steps, rounds, rows)
    stage.sweep()
    if "start" in steps and (
        faster := rows["start"].series.compared("peer", "ours", lambda theirs, ours: theirs / ours)
    ):
        rows["start"].notes.append(f"{faster.median:.1f} times as fast as the peer over ssh (goal: 1.8)")
    return told


def _first(stage: Stage, rounds: int) -> list[Row]:
    """A host that was booted just now and a server that was started just now; launchers call back through ssh."""
    row = Row("over ssh: first start on a new host", "ms", Series(), Goal(700, of="local", how="difference"))
    ours = stage.contestant("ours", stage.folder / "first", callback="ssh")
    try:
        for _ in range(rounds):
            for contestant in (ours, *stage.named("local")):
                contestant.renew()
                contestant.host.ask("about")
                if contestant is ours:
                    stage.cluster["h1"].reboot()
                row.series.add(contestant.name, 1000 * contestant.host.ask("start", kernel="ipykernel"))
                contestant.forget()
    finally:
        ours.close()
    row.notes.append("the first start of a server process, on a host that nobody was on since it was made")
    return [row]


def _crowd(stage: Stage, rounds: int) -> list[Row]:
    ready = Row(f"over ssh: {COUNT} starts at once, all ready", "ms", Series(), Goal(0.33, of="peer"))
    late = Row("over ssh: event loop's lag meanwhile, longest", "ms", Series(), Goal(5, of="bare", how="difference"))
    (ours,), peers = stage.named("ours"), stage.named("peer")
    second = stage.contestant("ours", stage.folder / "second")
    try:
        for number in range(-1, rounds):
            found = _at_once(ours, ready, COUNT)
            second.host.tell("crowd", count=COUNT)
            ours.host.ask("nothing", count=COUNT)
            second.host.answer()
            nothing = ours.host.ask("noticed")
            second.forget()
            ours.forget()
            if number < 0:
                ready.series.forget()
                continue
            if found:
                late.series.add("ours", 1000 * found["lag"]["longest"])
                late.series.add("bare", 1000 * nothing["longest"])
            for peer in peers if number < 2 else ():  # twice will do
                if found := _at_once(peer, ready, COUNT):
                    late.series.add("peer", 1000 * found["lag"]["longest"])
                stage.sweep()
    finally:
        second.close()
    late.notes.append(f"bare: a host whose {COUNT} starts do nothing, while another one starts as many over ssh")
    return [ready, late]


def _at_once(contestant: Contestant, row: Row, count: int) -> dict[str, Any] | None:
    """Start kernels that are ready at once, and end them; None if that failed."""
    try:
        found: dict[str, Any] = contestant.host.ask("crowd", count=count, timeout=PATIENCE)
    except Failed as error:
        row.series.fail(contestant.name, str(error))
        contestant.renew()
        return None
    contestant.forget()
    if found["failures"]:
        many = f"{len(found['failures'])} of {count} starts failed: {found['failures'][0]}"
        row.series.fail(contestant.name, many)
        return None
    row.series.add(contestant.name, 1000 * found["seconds"])
    return found


def _watch(stage: Stage, kernels: int, seconds: float) -> list[Row]:
    row = Row(f"over ssh: CPU of the host process, {kernels} idle kernels", "%", Series(), Goal(1))
    watcher = Program("watcher", stage.folder / "watcher.log")
    try:
        (ours,) = stage.named("ours")
        watcher.ask("start")
        before = watcher.ask("cpu")
        found = ours.host.ask("idle", kernels=kernels, seconds=seconds, clients_too=False, timeout=600)
        watcher.ask("stop")
        row.series.add("ours", 100 * max(0.0, found["cpu"] - (watcher.ask("cpu") - before) / seconds))
        ours.forget()
    finally:
        watcher.close()
    return [row]


@contextmanager
def _far_host(folder: Path) -> Iterator[tuple[Link, Contestant]]:
    """A host behind a long line, and a server that has been there."""
    with ExitStack() as stack:
        link = Link()
        link.up()
        stack.callback(link.down)
        sshd = Sshd(link)
        sshd.up()
        stack.callback(sshd.down)
        stanza = {"provisioner_name": "distributed-provisioner", "config": {"remote_hosts": ["h1"], "callback": "dial"}}
        env = {"GP_SSH_CONFIG": str(sshd.config), "GP_RESPONSE_IP": link.near}
        contestant = Contestant("ours", folder / "far", stanza, env)
        stack.callback(contestant.close)
        yield link, contestant


def _far(folder: Path, rounds: int) -> list[Row]:
    """How many round trips of a long line a start and an interrupt take."""
    rows = {
        "returned": Row("over ssh: round trips until the start returns", "", Series(), Goal(5)),
        "ready": Row("over ssh: round trips until ready", "", Series(), Goal(9)),
        "interrupt": Row("over ssh: round trips of an interrupt", "", Series(), Goal(1.5)),
    }
    with _far_host(folder) as (link, contestant):
        for number in range(-1, rounds):
            took = []
            for delay in (0.0, RTT):
                link.shape(delay=delay)
                took.append([*contestant.host.ask("phases", kernel="ipykernel"), contestant.host.ask("interrupt")])
                link.shape()
                contestant.forget()
            if number >= 0:
                for row, near, far in zip(rows.values(), *took, strict=True):
                    row.series.add("ours", (far - near) / RTT)
    for row in rows.values():
        row.notes.append(f"what a line of {1000 * RTT:.0f} ms adds, on a connection that is there")
    return list(rows.values())
