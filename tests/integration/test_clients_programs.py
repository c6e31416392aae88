"""Programs that run notebooks and scripts or talk to a kernel, unchanged, with a kernelspec of only our stanza."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pexpect
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from support.installation import Installation

pytestmark = [pytest.mark.timeout(120), pytest.mark.relay]

BIN = Path(sys.executable).parent
PATIENCE = 60.0
"""Seconds for a program with its kernel, on a busy machine."""

ENDLESS = "print('running', flush=True)\nwhile True: pass"


@pytest.fixture
def spec(installation: Installation, ipykernel_spec: Path) -> Iterator[str]:
    """Name of a kernelspec of ipykernel with only our stanza, by which a kernel is started."""
    installation.jupyter.install_spec("remote", ipykernel_spec)
    yield "remote"
    assert list(installation.data_dir.iterdir()), "it was not gp that started the kernel"


def notebook(*cells: str) -> Any:
    """A notebook of these cells."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])  # type: ignore[no-untyped-call]
    made.metadata["kernelspec"] = {"name": "remote", "display_name": "Remote", "language": "python"}
    return made


def written(installation: Installation, *cells: str, tags: tuple[str, ...] = ()) -> Path:
    """A notebook file of these cells, the first with tags."""
    made = notebook(*cells)
    made.cells[0].metadata["tags"] = list(tags)
    path = installation.home / "in.ipynb"
    nbformat.write(made, path)  # type: ignore[no-untyped-call]
    return path


def shown(cells: Any) -> list[str]:
    """What each cell printed, and its result or error."""
    return ["".join(_text(output) for output in cell.get("outputs", ())) for cell in cells]


def _text(output: Any) -> str:
    return str(output.get("text") or output.get("data", {}).get("text/plain", "") or output.get("ename", ""))


def read(path: Path) -> list[str]:
    """What each cell of a notebook file shows."""
    return shown(nbformat.read(path, as_version=4).cells)  # type: ignore[no-untyped-call]


def program(name: str, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    argv = [str(BIN / name), *map(str, arguments)]
    return subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=PATIENCE)


# -- nbclient


def test_nbclient(installation: Installation, spec: str) -> None:
    made = notebook("x = 6\nprint('hello')", "x * 7", "%%bash\necho from a child")
    NotebookClient(made, timeout=PATIENCE).execute()
    assert shown(made.cells) == ["hello\n", "42", "from a child\n"]
    installation.check_nothing_left()


def test_nbclient_failing_cell(installation: Installation, spec: str) -> None:
    made = notebook("1/0", "'never'")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        NotebookClient(made, timeout=PATIENCE).execute()
    assert shown(made.cells) == ["ZeroDivisionError", ""]
    installation.check_nothing_left()


def test_nbclient_interrupts_a_cell_that_takes_too_long(installation: Installation, spec: str) -> None:
    made = notebook(ENDLESS, "6*7")
    NotebookClient(made, timeout=2, interrupt_on_timeout=True, allow_errors=True).execute()
    assert shown(made.cells) == ["running\nKeyboardInterrupt", "42"]


def test_nbclient_sees_a_dead_kernel(installation: Installation, spec: str) -> None:
    made = notebook("import os; os.kill(os.getpid(), 9)", "'never'")
    with pytest.raises(DeadKernelError):
        NotebookClient(made, timeout=PATIENCE).execute()
    installation.check_nothing_left()


MEET = """
import pathlib, time
pathlib.Path("{mine}").touch()
deadline = time.monotonic() + 40
while not pathlib.Path("{other}").exists():
    assert time.monotonic() < deadline, "the other notebook did not come"
    time.sleep(0.01)
"""


async def test_two_notebooks_at_once(installation: Installation, spec: str) -> None:
    here, there = installation.home / "here", installation.home / "there"
    first = notebook(MEET.format(mine=here, other=there), "'first'")
    second = notebook(MEET.format(mine=there, other=here), "'second'")
    clients = [NotebookClient(made, timeout=PATIENCE) for made in (first, second)]
    await asyncio.wait_for(asyncio.gather(*(client.async_execute() for client in clients)), PATIENCE)
    assert shown(first.cells) == ["", "'first'"]
    assert shown(second.cells) == ["", "'second'"]


# -- nbconvert


def test_nbconvert(installation: Installation, spec: str) -> None:
    source = written(installation, "x = 6", "x * 7")
    done = program("jupyter", "nbconvert", "--execute", "--to", "notebook", "--output", "out", source)
    assert done.returncode == 0, done.stderr
    assert read(installation.home / "out.ipynb") == ["", "42"]
    installation.check_nothing_left()


def test_nbconvert_failing_cell(installation: Installation, spec: str) -> None:
    source = written(installation, "1/0")
    done = program("jupyter", "nbconvert", "--execute", "--to", "notebook", "--output", "out", source)
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stderr
    installation.check_nothing_left()


# -- papermill


def test_papermill(installation: Installation, spec: str) -> None:
    source, target = written(installation, "x = 1", "x * 7", tags=("parameters",)), installation.home / "out.ipynb"
    done = program("papermill", source, target, "-k", spec, "-p", "x", 6)
    assert done.returncode == 0, done.stderr
    assert read(target) == ["", "", "42"]
    installation.check_nothing_left()


def test_papermill_failing_cell(installation: Installation, spec: str) -> None:
    source, target = written(installation, "1/0", "'never'"), installation.home / "out.ipynb"
    done = program("papermill", source, target, "-k", spec)
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stderr
    assert "ZeroDivisionError" in read(target)
    installation.check_nothing_left()


# -- jupyter run


def test_run(installation: Installation, spec: str) -> None:
    script = installation.home / "script.py"
    script.write_text("import os\nprint('pid', os.getpid(), 6*7)")
    done = program("jupyter", "run", f"--kernel={spec}", script)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"pid \d+ 42\n", done.stdout)
    assert "Traceback" not in done.stderr
    installation.check_nothing_left()


def test_run_of_standard_input(installation: Installation, spec: str) -> None:
    done = program("jupyter", "run", f"--kernel={spec}", stdin="print(6*7)")
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
    installation.check_nothing_left()


def test_run_of_a_failing_script(installation: Installation, spec: str) -> None:
    done = program("jupyter", "run", f"--kernel={spec}", stdin="1/0")
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stderr
    installation.check_nothing_left()


def test_run_is_interrupted(installation: Installation, spec: str) -> None:
    argv = [str(BIN / "jupyter"), "run", f"--kernel={spec}"]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        try:
            running.stdin.write(ENDLESS)
            running.stdin.close()
            running.stdin = None
            assert running.stdout.readline() == "running\n"
            running.send_signal(signal.SIGINT)
            _, errors = running.communicate(timeout=PATIENCE)
        finally:
            running.kill()
    assert running.returncode == 1
    assert "KeyboardInterrupt" in errors
    installation.check_nothing_left()


# -- jupyter console


class Console:
    """A `jupyter console` in a terminal."""

    def __init__(self, terminal: Any) -> None:
        self.terminal = terminal
        self._cells = 0

    def prompt(self) -> None:
        """Wait until it asks for the next cell."""
        self._cells += 1
        self.shows(rf"In \[{_numbered(self._cells)}\]: ")

    def result(self, line: str, value: str) -> None:
        """Type a cell, and wait for its result and for the next prompt."""
        self.cell(line, rf"Out\[{_numbered(self._cells)}\]: \S*{value}")

    def send(self, line: str) -> None:
        """Type a line."""
        self.terminal.sendline(line)

    def shows(self, pattern: str) -> None:
        """Wait for something on the screen."""
        self.terminal.expect(pattern)

    def cell(self, line: str, pattern: str) -> None:
        """Type a cell, and wait for what it shows and for the next prompt."""
        self.send(line)
        self.shows(pattern)
        self.prompt()

    def interrupt(self) -> None:
        """Press Ctrl-C: the terminal tells every process of its foreground, launcher and kernel if they are there."""
        self.terminal.sendintr()

    def ends(self) -> None:
        """Wait for its end."""
        self.terminal.expect(pexpect.EOF)
        self.terminal.close()
        assert self.terminal.exitstatus == 0


def _numbered(cell: int) -> str:
    return rf"(?:\x1b\S*m)?{cell}(?:\x1b\S*m)?"  # with or without colours


@contextmanager
def console(spec: str, *options: str) -> Iterator[Console]:
    """Start a console, and wait for its first prompt."""
    # nobody here answers a prompt that asks the terminal where its cursor is
    env = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    argv = ["console", f"--kernel={spec}", *options]
    # a wide terminal breaks no line
    terminal = pexpect.spawn(
        str(BIN / "jupyter"), argv, env=env, timeout=PATIENCE, dimensions=(50, 200), encoding="utf-8"
    )
    try:
        made = Console(terminal)
        made.prompt()
        yield made
    finally:
        terminal.close(force=True)


@pytest.mark.parametrize("options", [[], ["--simple-prompt"]], ids=["full", "simple"])
def test_console(installation: Installation, spec: str, options: list[str]) -> None:
    with console(spec, *options) as used:
        # what is waited for must not stand in the line that is typed, which the terminal shows too
        used.cell("x = 6; print('he' + 'llo')", "hello")
        used.result("x * 7", "42")

        used.send("print('run' + 'ning', flush=True); [None for _ in iter(int, 1)]")
        used.shows("running")
        used.interrupt()
        used.shows("KeyboardInterrupt")
        used.prompt()
        used.result("x * 8", "48")

        used.send("exit")
        used.ends()
    installation.check_nothing_left()


def test_console_end_of_input(installation: Installation, spec: str) -> None:
    with console(spec, "--simple-prompt") as used:
        used.terminal.sendeof()
        used.shows("really want to exit")
        used.send("y")
        used.ends()
    installation.check_nothing_left()


def test_console_asks_for_input(installation: Installation, spec: str) -> None:
    with console(spec, "--simple-prompt") as used:
        used.send("name = input('who' + '? ')")
        used.shows(r"who\? ")
        used.send("ada")
        used.prompt()
        used.result("name.upper()", "'ADA'")
        used.send("exit")
        used.ends()
    installation.check_nothing_left()
