"""The life of a kernel, from start to shutdown, by all contestants in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from contestants import Contestant
from harness import Failed, Goal, Row, Series

LIFE = ("start", "interrupt", "restart", "restart-now", "shutdown", "death")
COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "start": ("start", {"kernel": "ipykernel"}),
    "interrupt": ("interrupt", {}),
    "restart": ("restart", {"now": False}),
    "restart-now": ("restart", {"now": True}),
    "shutdown": ("shutdown", {}),
    "death": ("death", {}),
}


def in_turn(contestants: Iterable[Contestant], series: Series, measure: Callable[[Contestant], float]) -> None:
    """Take one sample of each contestant."""
    for contestant in contestants:
        try:
            series.add(contestant.name, measure(contestant))
        except Failed as error:
            series.fail(contestant.name, str(error))


def _step(contestants: list[Contestant], series: Series, step: str) -> None:
    command, arguments = COMMANDS[step]

    def measure(contestant: Contestant) -> float:
        try:
            return 1000 * contestant.host.ask(command, **arguments)
        except Failed:
            contestant.host.ask("forget")
            raise

    in_turn(contestants, series, measure)


def life(contestants: list[Contestant], wanted: set[str], rounds: int) -> list[Row]:
    """Rounds of start, interrupt, restart, restart now, shutdown; then start, kill -9."""
    goals = {
        "start": ("start to ready (ipykernel)", Goal(1.2, of="local")),
        "restart": ("restart", Goal(1.2, of="local")),
        "restart-now": ("restart now", Goal(1.2, of="local")),
        "interrupt": ("interrupt to execute_reply", Goal(1.2, of="local")),
        "death": ("kill -9 until poll() says so", Goal(50)),
        "shutdown": ("shutdown", Goal(1.5, of="local")),
    }
    rows = {step: Row(text, "ms", Series(), goal) for step, (text, goal) in goals.items() if step in wanted}
    for number in range(-1, rounds):  # the first is to warm up: byte code, file cache, the listener
        for step in LIFE:
            if step == "death":
                _step(contestants, Series(), "start")
            elif step not in ("start", "shutdown") and step not in wanted:
                continue
            counted = number >= 0 and step in wanted
            _step(contestants, rows[step].series if counted else Series(), step)
        for contestant in contestants:
            contestant.host.ask("forget")
    return list(rows.values())


def own_cost(contestants: list[Contestant], rounds: int) -> list[Row]:
    """Start and shutdown now of a kernel that is ready at once."""
    row = Row("own cost of a start (kernel ready at once)", "ms", Series(), Goal(120))
    for number in range(-1, rounds):
        series = row.series if number >= 0 else Series()
        in_turn(contestants, series, lambda contestant: 1000 * contestant.host.ask("start", kernel="instant"))
        for contestant in contestants:
            contestant.host.ask("forget")
    over = row.series.compared("ours", "local", lambda mine, local: mine - local)
    if over:
        row.notes.append(f"{over.median:.0f} ms more than the local provisioner needs for the same kernel")
    return [row]


def stillborn(contestants: list[Contestant], rounds: int) -> list[Row]:
    """Start of a kernel that dies at once."""
    row = Row("kernel that dies at once: error after", "ms", Series(), Goal(500))
    texts: dict[str, str] = {}
    for number in range(-1, rounds):
        for contestant in contestants:
            if contestant.name == "peer" and number != 0:
                continue  # one is enough: it waits for its whole launch timeout
            found = contestant.host.ask("stillborn")
            if number >= 0:
                row.series.add(contestant.name, 1000 * found["seconds"])
            texts[contestant.name] = found["error"].splitlines()[0]
    row.notes += [f"{who} says: {text}" for who, text in texts.items()]
    row.notes.append("the local provisioner's start succeeds; the error comes from the client's wait_for_ready")
    return [row]
