"""Processes in namespaces of their own, and instance folders that outlive nobody.

A cluster's node is one `IsolatedNode`: whatever its daemon starts - jobs, kernels, processes that put
themselves into a new session - lives in the node's pid namespace and ends with it. That makes `power_off`
honest and leaves no trace, even after a `kill -9` of the test run.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from clusters.availability import Unavailable

_OWNER_FILE = "owner"
_UNCLAIMED_GRACE = 60.0
"""Seconds for which a folder without an owner is taken for one that is just being made."""

# When the starter ends, setpriv ends unshare, and unshare ends everything in the namespaces.
_NEW_NAMESPACES = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"),
)

# The first process of a pid namespace inherits its orphans: a waiting shell reaps them, a daemon would not.
_BOOT = """
hostname "$1" && mount --bind "$2" /etc/hosts || exit 99
shift 2
"$@" &
wait $!
"""


class IsolatedNode:
    """A daemon with its own pid, mount, uts and ipc namespace, host name and `/etc/hosts`, on our network.

    Start it from a thread that lives as long as the node shall: the kernel ends the node with that thread
    (PR_SET_PDEATHSIG counts threads, not processes).
    """

    def __init__(self, name: str, argv: Sequence[str], *, hosts_file: Path, log: Path, env: Mapping[str, str]) -> None:
        self.name = name
        self._argv = list(argv)
        self._hosts_file = hosts_file
        self._log = log
        self._env = dict(env)
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def check_available() -> None:
        """Raise `Unavailable` where this user may not make namespaces."""
        if os.geteuid() != 0:
            raise Unavailable("needs: root, to give every node a namespace of its own")
        for tool in ("unshare", "setpriv", "hostname"):
            if shutil.which(tool) is None:
                raise Unavailable(f"needs: apt-get install util-linux hostname ({tool} is missing)")
        probe = subprocess.run([*_NEW_NAMESPACES, "true"], capture_output=True, text=True)
        if probe.returncode:
            raise Unavailable(f"needs: the right to make namespaces: {probe.stderr.strip()}")

    @property
    def running(self) -> bool:
        """Whether the daemon is there."""
        return self._process is not None and self._process.poll() is None

    @property
    def ended(self) -> bool:
        """Whether the daemon was started and is gone, by itself or by `power_off`."""
        return self._process is not None and self._process.poll() is not None

    def start(self) -> None:
        """Start the daemon; returns at once."""
        if self.running:
            raise RuntimeError(f"node {self.name} is running already")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*_NEW_NAMESPACES, "sh", "-c", _BOOT, "sh", self.name, str(self._hosts_file), *self._argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,  # Ctrl-C in a terminal must reach pytest only
            )

    def power_off(self) -> None:
        """End the node with all that runs on it, without a farewell; returns when the last process is gone.

        Idempotent.
        """
        if self._process is None or self._process.poll() is not None:
            return  # its pid may be somebody else's by now
        # The namespace's first process, not `unshare` around it: then waiting for `unshare` is waiting for
        # everything. There is none while `unshare` is only starting, and then nothing else is either.
        for pid in _children(self._process.pid) or [self._process.pid]:
            _send(pid, signal.SIGKILL)
        self._process.wait()

    def wait_for_end(self, timeout: float) -> None:
        """Wait until the daemon has ended by itself.

        Args:
            timeout: Seconds.

        Raises:
            subprocess.TimeoutExpired: It has not.
        """
        if self._process is not None:
            self._process.wait(timeout)

    def freeze(self) -> None:
        """Stop every process of the node: a hang, where connections stay open and nobody answers."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        """Undo `freeze`."""
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, signum: signal.Signals) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        for first in _children(self._process.pid):
            for pid in _descendants(first):
                _send(pid, signum)


def make_instance_folder(prefix: str) -> Path:
    """Make a scratch folder that `sweep_instance_folders` removes once this process is gone.

    It lies directly in the temporary folder, not in pytest's: a unix socket's path has at most 107 bytes.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    (folder / _OWNER_FILE).write_text(_identity(os.getpid()))
    return folder


def sweep_instance_folders(prefix: str) -> None:
    """Remove the folders of test runs that were killed; their processes have gone with them."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        if _is_stale(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_stale(folder: Path) -> bool:
    try:
        owner = (folder / _OWNER_FILE).read_text()
    except OSError:
        try:
            return time.time() - folder.stat().st_mtime > _UNCLAIMED_GRACE
        except OSError:
            return False  # somebody else has just removed it
    pid, _, namespace = owner.split()
    # Where /tmp is shared between containers, the pids of another one say nothing here.
    return namespace == os.readlink("/proc/self/ns/pid") and _identity(int(pid)) != owner


def _identity(pid: int) -> str:
    """What tells a process from a later one with its pid: pid, start time in clock ticks, pid namespace."""
    try:
        # Field 22 of proc(5); the command name, which is field 2, may hold blanks and parentheses.
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        started = "-"
    return f"{pid} {started} {os.readlink('/proc/self/ns/pid')}"


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _descendants(pid: int) -> Iterator[int]:
    yield pid
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return
    for thread in threads:
        try:
            children = Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
        except OSError:
            continue
        for child in children:
            yield from _descendants(int(child))


def _send(pid: int, signum: signal.Signals) -> None:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        pass
