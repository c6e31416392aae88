"""Kernels that are not ipykernel: interrupted by signal, by message, and one that dies when it is interrupted."""

from __future__ import annotations

import os
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
    exit: str
    """Ends the kernel's process with code 17."""


LANGUAGES = {
    "R": Language(
        "irkernel_spec",
        "signal",
        "cat('running'); flush.console(); repeat Sys.sleep(0.01)",
        "cat(Sys.getpid())",
        "x <- 6",
        "if (exists('x')) x * 7 else 'gone'",
        "quit(status = 17)",
    ),
    "Java": Language(
        "jjava_spec",
        "message",
        'System.out.println("running"); while (true) Thread.sleep(10);',
        "System.out.print(ProcessHandle.current().pid());",
        "int x = 6;",
        "x * 7",
        "System.exit(17);",
    ),
    "Python": Language(
        "xeus_python_spec",
        "signal",
        "import time\nprint('running', flush=True)\nwhile True: time.sleep(0.01)",
        "import os; print(os.getpid(), end='')",
        "x = 6",
        "x * 7",
        "import os; os._exit(17)",
    ),
}


class Kernel(NamedTuple):
    """A kernel of some language, ready for its first cell."""

    speaks: Language
    driven: Driven


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


@pytest.fixture(params=[KernelManager, AsyncKernelManager], ids=["blocking", "async"])
def manager_class(request: pytest.FixtureRequest) -> type[KernelManager]:
    """Both kinds of manager."""
    chosen: type[KernelManager] = request.param
    return chosen


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


def test_shutdown_now_while_busy(installation: Installation, kernel: Kernel) -> None:
    kernel.driven.start_cell(kernel.speaks.endless, "running")
    kernel.driven.do(kernel.driven.manager.shutdown_kernel(now=True))
    installation.check_nothing_left()


def test_end_is_told(installation: Installation, kernel: Kernel) -> None:
    speaks, used = kernel
    used.client.execute(speaks.exit)
    wait_until(lambda: not used.alive, 10)
    print("EXIT CODE", used.exit_code)
    used.restart()
    os.kill(int(used.run(speaks.pid)), signal.SIGKILL)
    wait_until(lambda: not used.alive, 10)
    print("KILL CODE", used.exit_code)
    used.restart()
    used.run(speaks.assign)
    assert "42" in used.run(speaks.get)


# -- a kernel that dies of an interrupt


def test_dies_of_an_interrupt(
    installation: Installation,
    xeus_python_spec: Path,
    manager_class: type[KernelManager],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    speaks = LANGUAGES["Python"]
    installation.jupyter.install_spec("remote", xeus_python_spec)
    with driven(manager_class(kernel_name="remote")) as kernel:
        info = kernel.manager.get_connection_info()
        kernel.run(speaks.assign)
        assert "42" in kernel.run(speaks.get)
        kernel.start_cell(speaks.endless, "running")
        kernel.do(kernel.manager.interrupt_kernel())
        wait_until(lambda: not kernel.alive, 10)
        print("XEUS CODE", kernel.exit_code)
        print(caplog.text)
        kernel.restart()
        assert kernel.alive
        kernel.run(speaks.assign)
        assert "42" in kernel.run(speaks.get)
        assert kernel.manager.get_connection_info() == info
        kernel.do(kernel.manager.shutdown_kernel())
        installation.check_nothing_left()
