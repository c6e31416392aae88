"""Kernels that are not ipykernel: interrupted by signal, by message, and one that dies when it is interrupted."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from jupyter_client.manager import AsyncKernelManager, KernelManager
from support.driven import Driven, driven
from support.installation import Installation, wait_until

pytestmark = pytest.mark.timeout(120)


class Language(NamedTuple):
    """How to say things to a kernel."""

    fixture: str
    """That holds its kernelspec."""
    interrupt_mode: str
    endless: str
    """Prints "running", and goes on until it is interrupted."""
    pid: str
    assign: str
    """Makes a variable x."""
    get: str
    """Shows it, if it is there."""
    end: str
    """Ends the kernel's process as something that went wrong would."""
    exit_code: int
    """Of that end."""


LANGUAGES = {
    "R": Language(
        "irkernel_spec",
        "signal",
        "cat('running'); flush.console(); repeat Sys.sleep(0.01)",
        "cat(Sys.getpid())",
        "x <- 6",
        "if (exists('x')) x * 7 else 'gone'",
        "tools::pskill(Sys.getpid(), tools::SIGKILL)",  # quit() would only ask the client to shut it down
        -signal.SIGKILL,
    ),
    "Java": Language(
        "jjava_spec",
        "message",
        # one snippet: an interrupt between two is lost, in a local kernel too; and so is one that comes before jjava
        # has put the running snippet on its list, which it does after it has started it
        'for (int i = 0; ; i++) { if (i == 20) System.out.println("running"); Thread.sleep(10); }',
        "System.out.print(ProcessHandle.current().pid());",
        "int x = 6;",
        "x * 7",
        "System.exit(17);",
        17,
    ),
}


class Kernel(NamedTuple):
    """A kernel of some language, ready for its first cell."""

    speaks: Language
    driven: Driven


@pytest.fixture(params=[KernelManager, AsyncKernelManager], ids=["blocking", "async"])
def manager_class(request: pytest.FixtureRequest) -> type[KernelManager]:
    """Both kinds of manager."""
    chosen: type[KernelManager] = request.param
    return chosen


@pytest.fixture(params=["R", "Java"])
def kernel(
    request: pytest.FixtureRequest, installation: Installation, manager_class: type[KernelManager]
) -> Iterator[Kernel]:
    """A kernel whose kernelspec has only our stanza."""
    speaks = LANGUAGES[request.param]
    installation.jupyter.install_spec("remote", request.getfixturevalue(speaks.fixture))
    with driven(manager_class(kernel_name="remote")) as made:
        assert made.manager.kernel_spec is not None
        assert made.manager.kernel_spec.interrupt_mode == speaks.interrupt_mode
        yield Kernel(speaks, made)


def test_life(installation: Installation, kernel: Kernel) -> None:
    speaks, used = kernel
    info = used.manager.get_connection_info()
    used.run(speaks.assign)
    assert "42" in used.run(speaks.get)

    first = used.run(speaks.pid)
    for _ in range(2):
        cell = used.start_cell(speaks.endless, "running")
        used.do(used.manager.interrupt_kernel())
        used.reply(cell)  # its status is the kernel's affair
        assert "42" in used.run(speaks.get), "the kernel and its variables survive"
    assert used.run(speaks.pid) == first

    used.restart()
    second = used.run(speaks.pid)
    assert second != first
    assert "42" not in used.run(speaks.get)
    used.restart(now=True)
    assert used.run(speaks.pid) not in (first, second)
    assert used.manager.get_connection_info() == info, "ports and keys stay over restarts"

    used.do(used.manager.shutdown_kernel())
    assert not used.manager.has_kernel
    installation.check_nothing_left()


@pytest.mark.parametrize("manager_class", [AsyncKernelManager], ids=["async"])  # starting Java takes seconds
def test_death_is_told(installation: Installation, kernel: Kernel) -> None:
    speaks, used = kernel
    used.client.execute(speaks.end)
    wait_until(lambda: not used.alive, 10)
    assert used.exit_code == speaks.exit_code
    used.restart()
    used.run(speaks.assign)
    assert "42" in used.run(speaks.get)

    used.start_cell(speaks.endless, "running")
    used.do(used.manager.shutdown_kernel(now=True))
    installation.check_nothing_left()


# -- a kernel that dies of an interrupt


ENDLESS = "import time\nprint('running', flush=True)\nwhile True: time.sleep(0.01)"


def test_kernel_that_dies_of_an_interrupt(
    installation: Installation,
    xeus_python_spec: Path,
    manager_class: type[KernelManager],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The kernel ends by itself: told with its exit code, and neither as a failure of gp nor as a lost session."""
    caplog.set_level("INFO")
    installation.jupyter.install_spec("remote", xeus_python_spec)
    with driven(manager_class(kernel_name="remote")) as kernel:
        info = kernel.manager.get_connection_info()
        for times in (1, 2):
            assert "42" in kernel.run("6*7")
            kernel.start_cell(ENDLESS, "running")
            kernel.do(kernel.manager.interrupt_kernel())
            wait_until(lambda: not kernel.alive, 10)
            assert kernel.exit_code == 0, "it handles SIGINT, by an exit that it takes for a good one"
            assert _said(caplog, kernel.manager.kernel_id).count("exited") == times
            kernel.restart()
            assert kernel.alive
        assert "42" in kernel.run("6*7")
        assert kernel.manager.get_connection_info() == info, "ports and keys stay over restarts"
        assert not {"failed", "lost"} & set(_said(caplog, kernel.manager.kernel_id))


def _said(caplog: pytest.LogCaptureFixture, kernel_id: str) -> list[str]:
    """The events of a kernel that the log has told, in order."""
    start = f"kernel {kernel_id}: "
    texts = [record.getMessage() for record in caplog.records]
    return [text.removeprefix(start).split()[0] for text in texts if text.startswith(start)]
