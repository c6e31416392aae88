"""What people see: one console, plain tables, and times in words."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Sequence

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

Cell = str | Text


def console(*, stderr: bool = False) -> Console:
    """Return a console that prints text as it is; into a pipe or file without cutting it at 80 columns."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else 200
    return Console(file=stream, markup=False, highlight=False, emoji=False, width=width)


def show(head: Sequence[str], rows: Iterable[Sequence[Cell]], *, right: Iterable[str] = ()) -> None:
    """Print a table.

    Args:
        head: Titles of the columns.
        rows: Cells.
        right: Titles of columns that hold numbers.
    """
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for number, title in enumerate(head):
        # the first column is what people copy: never broken
        justify: JustifyMethod = "right" if title in right else "left"
        table.add_column(title, justify=justify, overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    console().print(table)


def say(text: str = "") -> None:
    """Print a paragraph, filled to the width of the terminal; a path or command is never broken inside a word."""
    target = console()
    for line in text.split("\n"):
        filled = textwrap.fill(line, target.width, break_long_words=False, break_on_hyphens=False)
        target.print(filled, soft_wrap=True)


def span(seconds: float) -> str:
    """Return a time span as people say it."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
