"""Processes that are measured, samples of them in turn, and what is made of the samples."""

from __future__ import annotations

import contextlib
import json
import math
import queue
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).parent / "programs"


class Failed(Exception):
    """A measured process could not do what it was asked."""


class Program:
    """One of `programs/`, which answers commands; see `programs/lines.py`.

    Args:
        name: File in `programs/`, without suffix.
        log: Takes its standard error.
        python: Interpreter that runs it.
        env: Its whole environment; None: ours.
        arguments: Of its command line.
    """

    def __init__(
        self,
        name: str,
        log: Path,
        *,
        python: str = sys.executable,
        env: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        self.name, self.log = name, log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [python, str(PROGRAMS / f"{name}.py"), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=None if env is None else dict(env),
                text=True,
            )
        self.pid = self._process.pid
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def tell(self, do: str, **arguments: Any) -> None:
        """Send a command; `answer` fetches its result."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise Failed(f"{self.name} has ended; see {self.log}") from None

    def answer(self, timeout: float = 180.0) -> Any:
        """Return the result of the oldest command.

        Raises:
            Failed: It could not be done, or not in time.
        """
        try:
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise Failed(f"no answer within {timeout:g} s") from None
        if not line:
            raise Failed(f"{self.name} has ended; see {self.log}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["ok"]

    def ask(self, do: str, timeout: float = 180.0, **arguments: Any) -> Any:
        """Send a command and return its result."""
        self.tell(do, **arguments)
        return self.answer(timeout)

    def close(self) -> None:
        """End the process; it cleans up behind itself."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()


@dataclass
class Summary:
    """Median and spread of samples."""

    median: float
    p10: float
    p90: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary | None:
        kept = sorted(sample for sample in samples if not math.isnan(sample))
        if not kept:
            return None

        def percentile(share: float) -> float:
            position = share * (len(kept) - 1)
            low = math.floor(position)
            high = min(low + 1, len(kept) - 1)
            return kept[low] + (kept[high] - kept[low]) * (position - low)

        return cls(statistics.median(kept), percentile(0.1), percentile(0.9), len(kept))


@dataclass
class Series:
    """Samples of one figure: a column per contestant, a line per round; NaN where a contestant failed."""

    columns: dict[str, list[float]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)  #: first error of a contestant

    def add(self, who: str, sample: float) -> None:
        self.columns.setdefault(who, []).append(sample)

    def fail(self, who: str, problem: str) -> None:
        self.add(who, math.nan)
        self.problems.setdefault(who, problem)

    def forget(self) -> None:
        """Drop the samples until now, but not what went wrong."""
        self.columns = {
            who: [] if samples and not math.isnan(samples[-1]) else samples for who, samples in self.columns.items()
        }

    def summary(self, who: str) -> Summary | None:
        return Summary.of(self.columns.get(who, []))

    def compared(self, who: str, other: str, how: Callable[[float, float], float]) -> Summary | None:
        """Compare round by round, so that what disturbs both disturbs the comparison little."""
        mine, theirs = self.columns.get(who, []), self.columns.get(other, [])
        return Summary.of([how(a, b) for a, b in zip(mine, theirs, strict=False)])


@dataclass
class Goal:
    """What a figure shall reach.

    Args:
        limit: Of the median of ours, or of its comparison with another column.
        of: Column to compare with; empty: the figure itself.
        how: "ratio" or "difference".
        least: The limit is the least and not the most.
    """

    limit: float
    of: str = ""
    how: str = "ratio"
    least: bool = False


@dataclass
class Row:
    """One figure of the table.

    Args:
        figure: What is measured.
        unit: "ms", "s", "KiB", "MiB", "%", "/s" - samples are in this unit.
        series: The samples.
        goal: None: told only.
        notes: What the reader must know.
    """

    figure: str
    unit: str
    series: Series
    goal: Goal | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def compared(self) -> Summary | None:
        """Ratio to, or difference from, what the goal names; else the ratio to the local provisioner."""
        goal = self.goal or Goal(0, of="local")
        if goal.how == "difference":
            return self.series.compared("ours", goal.of, lambda mine, other: mine - other)
        return self.series.compared("ours", goal.of or "local", lambda mine, other: mine / other if other else math.nan)

    @property
    def judged(self) -> float | None:
        """What is held against the limit."""
        if self.goal is None:
            return None
        found = self.compared if self.goal.of else self.series.summary("ours")
        return None if found is None else found.median

    @property
    def met(self) -> bool | None:
        if self.goal is None or self.judged is None:
            return None
        return self.judged >= self.goal.limit if self.goal.least else self.judged <= self.goal.limit

    def to_json(self) -> dict[str, Any]:
        columns = {who: self.series.summary(who) for who in self.series.columns}
        return {
            "figure": self.figure,
            "unit": self.unit,
            **{who: asdict(found) if found else None for who, found in columns.items()},
            "compared": asdict(self.compared) if self.compared else None,
            "goal": asdict(self.goal) if self.goal else None,
            "judged": self.judged,
            "met": self.met,
            "notes": self.notes,
            "problems": self.series.problems,
            "samples": self.series.columns,
        }
