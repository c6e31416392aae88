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
    """Take one sample of each contestant; one that has only failed until now is not asked again."""
    for contestant in contestants:
        if contestant.name in series.problems and series.summary(contestant.name) is None:
            continue
        try:
            series.add(contestant.name, measure(contestant))
        except Failed as error:
            contestant.forget()
            series.fail(contestant.name, str(error))


def life(contestants: list[Contestant], wanted: set[str], rounds: int, rows: dict[str, Row] | None = None) -> list[Row]:
    """Rounds of start, interrupt, restart, restart now, shutdown; then start, kill -9.

    Args:
        contestants: In this order.
        wanted: Steps of `LIFE` that are told.
        rounds: That count.
        rows: For the samples; None: those of kernels on this machine.
    """
    rows = rows or {
        "start": Row("start to ready (ipykernel)", "ms", Series(), Goal(1.2, of="local")),
        "interrupt": Row("interrupt: call to execute_reply", "ms", Series(), Goal(1.2, of="local")),
        "restart": Row("restart", "ms", Series(), Goal(1.2, of="local")),
        "restart-now": Row("restart now", "ms", Series(), Goal(1.2, of="local")),
        "shutdown": Row("shutdown", "ms", Series(), Goal(1.5, of="local")),
        "death": Row("death: kill -9 until poll() says so", "ms", Series(), Goal(50)),
    }
    steps = [step for step in LIFE if step in wanted | {"start", "shutdown"}]
    for number in range(-1, rounds):
        taking_part = _taking_part(contestants, number, rounds)
        for step in steps:
            if step == "death":
                in_turn(taking_part, Series(), lambda contestant: contestant.host.ask("start", kernel="ipykernel"))
            command, arguments = COMMANDS[step]
            in_turn(taking_part, rows[step].series, _sample(command, arguments))
        for contestant in taking_part:
            contestant.forget()
        if number < 0:  # to warm up: byte code, file cache, the listener
            for row in rows.values():
                row.series.forget()
    return [row for step, row in rows.items() if step in wanted]


def _taking_part(contestants: list[Contestant], number: int, rounds: int) -> list[Contestant]:
    """Spare the peer most rounds: to end or restart a kernel takes it half a minute."""
    last = max(1, rounds // 4)
    return [contestant for contestant in contestants if contestant.name != "peer" or number < last]


def _sample(command: str, arguments: dict[str, Any]) -> Callable[[Contestant], float]:
    return lambda contestant: 1000 * contestant.host.ask(command, **arguments)


def own_cost(contestants: list[Contestant], rounds: int) -> list[Row]:
    """Start and shutdown now of a kernel that is ready at once."""
    row = Row("own cost of a start (kernel ready at once)", "ms", Series(), Goal(120))
    for number in range(-1, rounds):
        taking_part = _taking_part(contestants, number, rounds)
        in_turn(taking_part, row.series, _sample("start", {"kernel": "instant"}))
        for contestant in taking_part:
            contestant.forget()
        if number < 0:
            row.series.forget()
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
            contestant.forget()
            if number >= 0:
                row.series.add(contestant.name, 1000 * found["seconds"])
            texts[contestant.name] = found["error"].splitlines()[0]
    row.notes += [f"{who} says: {text}" for who, text in texts.items()]
    row.notes.append("the local provisioner's start succeeds; the error comes from the client's wait_for_ready")
    return [row]
