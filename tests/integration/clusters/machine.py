"""Machines of a cluster: each has its own network, processes, name and mounts, on this machine's kernel.

Nothing of them can be left behind: their namespaces have no names and end with their first process, which ends with
the thread that started it; the near end of a machine's line has this process's id in its name and goes with it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from clusters.availability import Unavailable
from clusters.wan.link import free_network

TOOLS = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux", "ps": "procps"}
STARTED = 20.0
"""Seconds for a machine to come up, on a busy one."""


def check_available(tools: Mapping[str, str]) -> None:
    """Raise `Unavailable` where no such machine can be.

    Args:
        tools: Programs that it needs besides, and the packages that have them.
    """
    if os.geteuid() != 0:
        raise Unavailable("needs: root, for namespaces")
    if missing := [package for tool, package in {**TOOLS, **tools}.items() if shutil.which(tool) is None]:
        raise Unavailable(f"needs: apt-get install {' '.join(dict.fromkeys(missing))}")


class Machine:
    """One machine.

    Args:
        name: Its own.
        folder: For its files, ``console`` among them.
        boot: Shell script of its first process, which gets folder and name as its arguments.
    """

    def __init__(self, name: str, folder: Path, boot: str) -> None:
        self.name = name
        self.address = self.near = ""
        self.folder = folder
        self._boot = boot
        self._device = f"gp{os.getpid()}{name}"
        self._process: subprocess.Popen[bytes] | None = None

    def up(self) -> None:
        """Boot it."""
        with (self.folder / "console").open("ab") as console:
            self._process = subprocess.Popen(
                # the first process of the namespaces waits for its line before it does anything
                [
                    *("setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--uts", "--ipc", "--pid"),
                    *("--fork", "--kill-child=KILL", "--propagation", "private"),
                    *("bash", "-c", f"read -r _; {self._boot}", "boot", str(self.folder), self.name),
                ],
                env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},  # of no test's gp
                stdin=subprocess.PIPE,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        deadline = time.monotonic() + STARTED
        while not self.first:
            self._must_live(deadline)
        near, far = self._line()
        run("ip", "link", "add", self._device, "type", "veth", "peer", "name", "eth0", "netns", str(self.first))
        run("ip", "address", "add", f"{near}/24", "dev", self._device)
        run("ip", "link", "set", self._device, "up")
        self.network("ip", "address", "add", f"{far}/24", "dev", "eth0")
        self.network("ip", "link", "set", "eth0", "up")
        self.wired()
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        self._process.stdin.close()
        while not self.answers():
            self._must_live(deadline)

    def wired(self) -> None:
        """Prepare its network, once its line is there and before anything runs."""

    def answers(self) -> bool:
        """Whether what it is for is up."""
        raise NotImplementedError

    def power_off(self) -> None:
        """End everything at once: nobody hears of it."""
        self.partition(True)
        self.down()

    def reboot(self) -> None:
        """End everything and boot again, with the same address."""
        self.power_off()
        self.up()

    def down(self) -> None:
        """End everything."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            deadline = time.monotonic() + 10  # the kernel removes the line some time after the last process
            while Path("/sys/class/net", self._device).exists() and time.monotonic() < deadline:
                with suppress(RuntimeError):
                    run("ip", "link", "delete", self._device)
                time.sleep(0.02)

    def partition(self, now: bool) -> None:
        """Cut its line, or mend it."""
        run("ip", "link", "set", self._device, "down" if now else "up")

    def freeze(self, now: bool) -> None:
        """Stop all its processes, or let them go on."""
        self.inside("kill", f"-{'STOP' if now else 'CONT'}", "-1", check=False)

    def inside(self, *argv: str, check: bool = True) -> str:
        """Run a command on it, and return its output."""
        return run("nsenter", "-t", str(self.first), "-a", *argv, check=check)

    def network(self, *argv: str) -> None:
        """Run a command of this machine in its network."""
        run(*self.there(*argv))

    def there(self, *argv: str) -> list[str]:
        """Return the command that runs one of this machine in its network."""
        return ["nsenter", "-t", str(self.first), "--net", *argv]

    @property
    def far(self) -> str:
        """Its address, as `Link` calls that of its far end."""
        return self.address

    @property
    def first(self) -> int:
        """Its first process; 0: there is none yet."""
        assert self._process is not None
        with suppress(OSError, IndexError):
            path = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
            return int(path.read_text().split()[0])
        return 0

    def _line(self) -> tuple[str, str]:
        if not self.address:
            network = free_network()
            self.near, self.address = f"{network[1]}", f"{network[2]}"
        return self.near, self.address

    def _must_live(self, deadline: float) -> None:
        assert self._process is not None
        if self._process.poll() is not None or time.monotonic() > deadline:
            raise Unavailable(f"{self.name} does not come up: {(self.folder / 'console').read_text()[-2000:]}")
        time.sleep(0.02)


def run(*argv: str, check: bool = True) -> str:
    """Run a command and return its output."""
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout
