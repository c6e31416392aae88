"""An installation of gp that only one test uses, and the proof that the test left nothing of it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from clusters.jupyter_env import JupyterEnv, isolated_jupyter

from gp_core import server
from gp_core.runtime import runtime

PATIENCE = 15.0
"""Seconds for processes to end and records to go, once a client has said goodbye."""


@dataclass
class Installation:
    """Folders of one gp and one Jupyter; every process of theirs has them in its environment.

    Args:
        jupyter: Folders and kernelspecs.
        own: Processes that the test holds itself, such as servers, which are nothing left over.
    """

    jupyter: JupyterEnv
    own: set[int] = field(default_factory=set)

    @property
    def home(self) -> Path:
        """The folder that holds everything."""
        return self.jupyter.home

    @property
    def data_dir(self) -> Path:
        """Key, records and logs of gp."""
        return self.home / "gp"

    def records(self) -> list[Path]:
        """The records of kernels, and whatever else lies beside them."""
        return sorted((self.data_dir / "kernels").glob("*"))

    def processes(self) -> dict[int, str]:
        """Command lines of all processes that were started from here, but those the test holds, by pid."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) in {os.getpid(), *self.own}:
                continue
            with suppress(OSError):
                if str(self.home).encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def left_over(self) -> list[str]:
        """What should not be there any more: processes, records, endpoints and folders of kernels."""
        files = [path for path in (self.home / "launchers").rglob("*") if not path.is_dir()]
        endpoints = list(self.jupyter.runtime_dir.glob("*-ipc-*"))
        return [
            *(f"process {pid}: {line}" for pid, line in self.processes().items()),
            *(f"file {path}" for path in [*self.records(), *files, *endpoints]),
        ]

    def check_nothing_left(self, within: float = PATIENCE) -> None:
        """Wait until nothing is left over, or fail.

        Args:
            within: Seconds.
        """
        with suppress(TimeoutError):
            wait_until(lambda: not self.left_over(), within)
        if left := self.left_over():
            pytest.fail("the test left behind:\n" + "\n".join(left), pytrace=False)

    def sweep(self) -> None:
        """Remove what a killed launcher leaves: others do that, but only after a minute."""
        shutil.rmtree(self.home / "launchers")

    def end_processes(self) -> None:
        """Kill what is left over, so that a failed test spoils no other."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], object], within: float, *, every: float = 0.02) -> None:
    """Wait for a condition.

    Args:
        condition: Looked at again and again.
        within: Seconds.
        every: Seconds between two looks.

    Raises:
        TimeoutError: It did not come true.
    """
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not happen within {within:g} s")
        time.sleep(every)


@contextmanager
def installed(channels: str) -> Iterator[Installation]:
    """Make an installation; at its end nothing of it may be left.

    Args:
        channels: "relay" or "direct".
    """
    with isolated_jupyter() as env, pytest.MonkeyPatch.context() as patch:
        installation = Installation(env)
        for name in [name for name in os.environ if name.startswith("GP_") and not name.startswith("GP_TEST_")]:
            patch.delenv(name)
        patch.setenv("GP_DATA_DIR", str(installation.data_dir))
        patch.setenv("GP_RUNTIME_DIR", str(env.home / "launchers"))
        patch.setenv("GP_RESPONSE_PORT", "0")
        if channels != "relay":  # the default is to be seen at work
            patch.setenv("GP_CHANNELS", channels)
        # managers in this process share one server: this test gets its own
        patch.setattr(server, "_server", None)
        try:
            yield installation
            installation.check_nothing_left()
        finally:
            installation.end_processes()
            if server._server is not None:
                asyncio.run(runtime().call(_close(server._server[1])))


async def _close(used: server.KernelServer) -> None:
    await asyncio.gather(*(kernel.remove(force=True) for kernel in list(used.kernels.values())))
    if used.rendezvous is not None:
        used.rendezvous.close()
        await asyncio.sleep(0)
    runtime().at_exit.clear()
