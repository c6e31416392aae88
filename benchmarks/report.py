"""The table, its explanation, and the machine that it was made on."""

from __future__ import annotations

import json
import math
import os
import platform
import ssl
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness import Row, Summary
from rich.console import Console
from rich.table import Table

COLUMNS = ("ours", "local", "peer", "direct", "ssh", "bare")


def machine(work: Path) -> dict[str, Any]:
    """Name what absolute figures depend on."""
    models = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory[0] / 2**20, 1) if memory else None,
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        "file_system": _file_system(work),
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "hosts": {},
        "versions": {
            name: version(name) for name in ("gp-core", "gp-launchers", "jupyter_client", "ipykernel", "pyzmq")
        },
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _file_system(folder: Path) -> str:
    """Return the type of the file system that records are written to: what an fsync costs is its business."""
    best = ("", "unknown")
    for line in _lines("/proc/mounts"):
        point, kind = line.split()[1:3]
        if folder.is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]


def show(rows: list[Row], facts: dict[str, Any], console: Console) -> None:
    """Print the table, then what must be known to read it."""
    notes: list[str] = []
    for channels in (False, True):  # with other columns than the rest
        some = [row for row in rows if bool({"direct", "ssh"} & set(row.series.columns)) == channels]
        if some:
            console.print(_table(some, notes))
    for number, note in enumerate(notes, 1):
        console.print(f"[{number}] {note}", markup=False, highlight=False, soft_wrap=True)
    load = ", ".join(map(str, facts["load_before"]))
    console.print(
        f"\n{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['kernel']}, "
        f"Python {facts['python']}, {facts['openssl']}, {facts['file_system']}; load before: {load}\n"
        + ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
        + "".join(f"; peer: {found}" for who, found in facts["hosts"].items() if who == "peer"),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _table(rows: list[Row], notes: list[str]) -> Table:
    """Make the table of some rows; what must be known is added to the notes."""
    used = [column for column in COLUMNS if any(row.series.columns.get(column) for row in rows)]
    table = Table(title="Medians (p10 - p90)", title_justify="left", show_lines=True)
    table.add_column("figure", max_width=34)
    for column in used:
        table.add_column(column, justify="right")
    table.add_column("compared", justify="right")
    table.add_column("goal")
    table.add_column("result")
    for row in rows:
        marks = ""
        for note in [*row.notes, *(f"{who}: {why}" for who, why in row.series.problems.items())]:
            if note not in notes:
                notes.append(note)
            marks += f" [{notes.index(note) + 1}]"
        cells = [_cell(row, column) for column in used]
        table.add_row(f"{row.figure}{marks}".replace("[", "\\["), *cells, _compared(row), _goal(row), _result(row))
    return table


def _number(value: float, unit: str) -> str:
    if unit == "ms" and value >= 10_000:
        return f"{value / 1000:.1f} s"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 1 else 2
    return f"{value:.{digits}f}" + ("" if unit in ("", "/s") else f" {unit}")


def _cell(row: Row, column: str) -> str:
    if column not in row.series.columns:
        return "-"
    found = row.series.summary(column)
    if found is None:
        return "cannot"
    spread = f"\n({_number(found.p10, '')} - {_number(found.p90, '')})" if found.count > 1 else ""
    return _number(found.median, row.unit) + spread


def _compared(row: Row) -> str:
    found = row.compared
    if found is None:
        return "-"
    if row.goal is not None and row.goal.how == "difference":
        return f"{found.median:+.1f} {row.unit}{_spread(found, '+.1f')}"
    return f"{found.median:.2f} x {row.goal.of if row.goal and row.goal.of else 'local'}{_spread(found, '.2f')}"


def _spread(found: Summary, form: str) -> str:
    return f"\n({found.p10:{form}} - {found.p90:{form}})" if found.count > 1 else ""


def _goal(row: Row) -> str:
    if row.goal is None:
        return "-"
    sign = ">=" if row.goal.least else "<="
    if not row.goal.of:
        return f"{sign} {row.goal.limit:g} {row.unit}".strip()
    if row.goal.how == "difference":
        return f"{sign} {row.goal.limit:g} {row.unit} more than {row.goal.of}"
    return f"{sign} {row.goal.limit:g} x {row.goal.of}"


def _result(row: Row) -> str:
    if row.goal is None:
        return "-"
    if row.judged is None:
        return "[yellow]not measured[/]"
    if row.met:
        return "[green]met[/]"
    by = abs(row.judged - row.goal.limit)
    if row.goal.of and row.goal.how == "ratio":
        return f"[red]missed by {by:.2f} ({by / row.goal.limit:.0%})[/]"
    share = f" ({by / row.goal.limit:.0%})" if row.goal.limit else ""
    return f"[red]missed by {_number(by, row.unit)}{share}[/]"


def save(rows: list[Row], facts: dict[str, Any], path: Path) -> None:
    """Write everything, samples included, as JSON."""
    path.write_text(
        json.dumps(_finite({"machine": facts, "figures": [row.to_json() for row in rows]}), indent=1) + "\n"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
