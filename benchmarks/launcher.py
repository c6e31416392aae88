"""What the launcher itself costs, in both of its forms, beside a bare interpreter."""

from __future__ import annotations

import os
from pathlib import Path

from harness import Goal, Program, Row, Series

FORMS = ("package", "pyz")


def cost(work: Path, rounds: int) -> list[Row]:
    """Start one launcher after the other, and a bare interpreter in between."""
    folder = work / "launcher"
    folder.mkdir(mode=0o700)
    program = Program("byhand", folder / "log", env={**os.environ, "GP_BENCH_WORK": str(folder)})
    rows = {
        (form, what): Row(f"launcher ({form}): {text}", unit, Series(), goal)
        for form in FORMS
        for what, text, unit, goal in (
            ("exec", "its exec to the kernel's exec", "ms", Goal(40)),
            ("hello", "its exec to hello", "ms", Goal(100)),
            ("rss", "resident memory", "MiB", Goal(24)),
            ("wake_ups", "wake-ups in a quiet second", "", Goal(0)),
        )
    }
    shell = Series()
    try:
        for number in range(-1, rounds):
            samples = {form: program.ask("one", form=form) for form in FORMS}
            bare = program.ask("interpreter")
            if number < 0:
                continue
            shell.add("shell", bare["shell"])
            for (form, what), row in rows.items():
                row.series.add("ours", samples[form][what])
                if what in ("hello", "rss"):
                    row.series.add("bare", bare["imported" if what == "hello" else "rss"])
                if what == "rss":
                    row.series.add("ours_pss", samples[form]["pss"])
                    row.series.add("bare_pss", bare["pss"])
    finally:
        program.close()
    floor = shell.summary("shell")
    if floor:
        text = f"the kernel is a shell that says when it runs; that alone takes {floor.median:.1f} ms of these"
        rows["package", "exec"].notes.append(text)
    rows["package", "hello"].notes.append("bare: exec of an interpreter until it has imported ssl, and its memory then")
    return list(rows.values())
