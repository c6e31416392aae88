"""A program of the tests that is driven by lines: one JSON answer for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.driven import Driven, client_of
from support.installation import Installation

SUPPORT = Path(__file__).parent


class Answering:
    """Its process.

    Args:
        installation: Whose it is; it is not taken for something left over.
        script: To run, one of this folder.
        argument: For it.
        env: More variables.
    """

    def __init__(self, installation: Installation, script: str, argument: str, **env: str) -> None:
        pipe = subprocess.PIPE
        argv = [sys.executable, str(SUPPORT / script), argument]
        self.process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, env={**os.environ, **env})
        installation.own.add(self.process.pid)

    def hear(self) -> dict[str, Any]:
        """Return the next thing it says; {} at its end."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        heard: dict[str, Any] = json.loads(line) if line else {}
        return heard

    def ask(self, what: str) -> dict[str, Any]:
        """Tell it to do something and return its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.hear()

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class HostApplication(Answering):
    """A host application with a manager of many kernels: `host.py`.

    Args:
        installation: Whose it is.
        manager: Name of the manager's class.
        env: More variables.
    """

    def __init__(self, installation: Installation, manager: str, **env: str) -> None:
        super().__init__(installation, "host.py", manager, **env)
        assert self.hear() == {"pid": self.process.pid}


def taken_over(installation: Installation, used: Driven, kernel_name: str, kernel_id: str) -> None:
    """Kill a server whose kernel has a variable, and start that kernel here: it still has it.

    Args:
        installation: Whose all this is.
        used: Takes the kernel over.
        kernel_name: Of its kernelspec.
        kernel_id: Its id.
    """
    former = HostApplication(installation, "MappingKernelManager")
    with client_of(former.ask(f"start {kernel_id} {kernel_name}")["connection"]) as client:
        client.execute("x = 41", reply=True, timeout=30)
        former.end()
        used.start(kernel_id=kernel_id)
        assert "42" in used.run("x + 1")
