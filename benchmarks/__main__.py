"""Run the benchmarks: `nox -s bench -- [--quick] [--only NAME] [--json FILE]`; README.md says what they mean."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attach
import channels
import crowd
import incontainers
import launcher
import overssh
import report
import starts
from contestants import NAMES, Contestant, peer_python
from harness import Row
from rich.console import Console

OF_ALL = (*starts.LIFE, "own-cost", "stillborn", "crowd", "idle")  # contestants on this machine
FIGURES = (*OF_ALL, "attach", "launcher", *channels.FIGURES, *overssh.FIGURES, *incontainers.FIGURES)


def main() -> int:
    """Measure what is asked for; the exit code says only whether that could be done."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", choices=FIGURES, metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("--quick", action="store_true", help="few rounds: a minute or two, and wide spreads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and samples")
    parser.add_argument("--no-peer", action="store_true", help="without gateway_provisioners")
    parser.add_argument("--keep", action="store_true", help="keep the folder with logs and records")
    given = parser.parse_args()
    wanted = set(given.only or FIGURES)
    console = Console() if sys.stdout.isatty() else Console(width=170)
    names = [name for name in NAMES if wanted & set(OF_ALL) and not (given.no_peer and name == "peer")]
    elsewhere = wanted & {*overssh.FIGURES, *incontainers.FIGURES}
    if "peer" in names or (elsewhere and not given.no_peer):
        peer_python()  # not while anything is measured
    work = Path(tempfile.mkdtemp(prefix="gp-bench-"))
    facts = report.machine(work)
    contestants = [Contestant(name, work) for name in names]
    rows: list[Row] = []
    try:
        facts["hosts"] = {contestant.name: contestant.host.ask("about")["versions"] for contestant in contestants}
        for some in measure(contestants, work, wanted, quick=given.quick, peer=not given.no_peer):
            rows += some
            if given.json:  # at once: half an hour is long
                report.save(rows, facts, given.json)
    finally:
        for contestant in contestants:
            contestant.close()
        if given.keep:
            print(f"logs and records: {work}", file=sys.stderr)
        else:
            shutil.rmtree(work, ignore_errors=True)
        if rows:
            report.show(rows, facts, console)
    return 0


def measure(
    contestants: list[Contestant], work: Path, wanted: set[str], *, quick: bool, peer: bool
) -> Iterator[list[Row]]:
    """Measure one group of figures after the other, and say on standard error how it goes."""
    groups: list[tuple[set[str], Callable[[], list[Row]]]] = [
        (set(starts.LIFE), lambda: starts.life(contestants, wanted, 3 if quick else 11)),
        ({"own-cost"}, lambda: starts.own_cost(contestants, 5 if quick else 25)),
        ({"stillborn"}, lambda: starts.stillborn(contestants, 2 if quick else 7)),
        ({"crowd"}, lambda: crowd.at_once(contestants, work, 2 if quick else 7)),
        ({"idle"}, lambda: crowd.idle_lag(contestants, work, 1 if quick else 5, 5 if quick else 10)),
        ({"attach"}, lambda: attach.attach(work, 2 if quick else 7, 1000, 10 if quick else 40)),
        ({"launcher"}, lambda: launcher.cost(work, 7 if quick else 25)),
        (set(channels.FIGURES), lambda: channels.measure(work, wanted, quick=quick)),
        (set(overssh.FIGURES), lambda: overssh.measure(work, wanted, quick=quick, peer=peer)),
        (set(incontainers.FIGURES), lambda: incontainers.measure(work, wanted, quick=quick, peer=peer)),
    ]
    for names, run in groups:
        if names & wanted:
            began = time.monotonic()
            print(", ".join(sorted(names & wanted)), end=" ...", file=sys.stderr, flush=True)
            yield run()
            print(f" {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
