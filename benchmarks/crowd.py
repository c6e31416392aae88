"""Many starts at once, and what the host application's event loop notices of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from contestants import Contestant
from harness import Failed, Goal, Program, Row, Series

COUNT = 50
LAG = ("p99", "longest")


def at_once(contestants: list[Contestant], work: Path, rounds: int) -> list[Row]:
    """Start 50 kernels that are ready at once, at once."""
    folder = work / "byhand"
    folder.mkdir(mode=0o700)
    byhand = Program("byhand", folder / "log", env={**os.environ, "GP_BENCH_WORK": str(folder)})
    watcher = Program("watcher", folder / "watcher.log")
    all_ready = Row(f"{COUNT} starts at once: all ready", "ms", Series(), Goal(1.15, of="bare"))
    late = {
        which: Row(f"event loop's lag meanwhile, {which}", "ms", Series(), Goal(5, of="bare", how="difference"))
        for which in LAG
    }
    cpu = Row(f"{COUNT} starts at once: CPU time of the host process", "ms", Series())
    idle = {which: Series() for which in LAG}
    try:
        for number in range(-1, rounds):
            for contestant in contestants:
                if contestant.name == "peer" and number not in (0, 1):
                    continue  # twice will do: it takes half a minute
                watcher.ask("start")
                try:
                    found = contestant.host.ask("crowd", count=COUNT, timeout=120)
                except Failed as error:
                    all_ready.series.fail(contestant.name, str(error))
                    contestant.renew()
                    found = None
                beside = watcher.ask("stop")
                contestant.forget()
                if number >= 0 and found:
                    _note(all_ready, cpu, late, contestant.name, found)
                    for which in LAG if contestant.name == "ours" else ():
                        idle[which].add("lag", 1000 * beside[which])
            by_hand = byhand.ask("crowd", count=COUNT)["seconds"]
            contestants[0].host.ask("nothing", count=COUNT)
            byhand.ask("crowd", count=COUNT)
            nothing = contestants[0].host.ask("noticed")
            contestants[0].forget()
            if number >= 0:
                all_ready.series.add("bare", 1000 * by_hand)
                for which, row in late.items():
                    row.series.add("bare", 1000 * nothing[which])
    finally:
        byhand.close()
        watcher.close()
    all_ready.notes.append("bare: launchers started by hand, a server of asyncio's TLS that knows three messages")
    late["p99"].notes.append(
        f"bare: a host whose {COUNT} starts do nothing, so that jupyter_client's own part remains, "
        "then another process starts as many launchers by hand"
    )
    for which, row in late.items():
        if found := idle[which].summary("lag"):
            row.notes.append(
                f"a process that does nothing, beside ours at the same time: {which} {found.median:.0f} ms"
            )
    return [all_ready, *late.values(), cpu]


def _note(all_ready: Row, cpu: Row, late: dict[str, Row], who: str, found: dict[str, Any]) -> None:
    if found["failures"]:
        problem = f"{len(found['failures'])} of {COUNT} starts failed, the first: {found['failures'][0]}"
        all_ready.series.fail(who, problem)
    else:
        all_ready.series.add(who, 1000 * found["seconds"])
    cpu.series.add(who, 1000 * found["cpu"])
    for which, row in late.items():
        row.series.add(who, 1000 * found["lag"][which])


def idle_lag(contestants: list[Contestant], work: Path, rounds: int, seconds: float) -> list[Row]:
    """Ten kernels that do nothing: how late the host's loop is, beside an idle process at the same time."""
    watcher = Program("watcher", work / "watcher.log")
    late = {
        which: Row(f"event loop's lag when idle, {which}", "ms", Series(), Goal(limit, of="bare", how="difference"))
        for which, limit in (("p99", 0.5), ("longest", 5))
    }
    cpu = Row("CPU of the host process when idle (10 kernels)", "%", Series())
    try:
        for _ in range(rounds):
            for contestant in contestants:
                watcher.ask("start")
                before = watcher.ask("cpu")
                found = contestant.host.ask("idle", kernels=10, seconds=seconds, timeout=400)
                own = (watcher.ask("cpu") - before) / seconds
                lag = watcher.ask("stop")
                contestant.forget()
                cpu.series.add(contestant.name, 100 * max(0.0, found["cpu"] - own))
                for which, row in late.items():
                    row.series.add(contestant.name, 1000 * found["lag"][which])
                    if contestant.name == "ours":
                        row.series.add("bare", 1000 * lag[which])
    finally:
        watcher.close()
    cpu.notes.append("without what the measurement itself costs")
    return [*late.values(), cpu]
