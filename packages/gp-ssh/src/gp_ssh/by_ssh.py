"""Connections that the user's own ssh makes, for what paramiko cannot: Kerberos, security keys, one-time passwords.

One ssh holds the connection (a master, in ssh's words) and every question is a session of it. A connection that a
person has opened by hand and shares by ``ControlPath`` is used as it is, and left open.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from pathlib import Path

from gp_core import BackendError

from .connection import (
    COMMAND,
    HOST_KEY_CHANGED,
    HOST_KEY_UNKNOWN,
    NOT_ADMITTED,
    UNANSWERED,
    UNREACHABLE,
    Answer,
    Connection,
    ConnectionFailed,
    Listener,
    Unanswered,
    end_process,
)
from .hosts import Target

REASONS = {
    "REMOTE HOST IDENTIFICATION HAS CHANGED": HOST_KEY_CHANGED,
    "host key is known for": HOST_KEY_UNKNOWN,
    "Host key verification failed": HOST_KEY_UNKNOWN,
    "Permission denied": NOT_ADMITTED,
    "Too many authentication failures": NOT_ADMITTED,
}
HOLD = "exec cat >/dev/null"  # its input ends with this process, and with it the connection; every shell knows it
BATCH = ("-T", "-o", "BatchMode=yes", "-o", "ClearAllForwardings=yes", "-o", "RemoteCommand=none")
MASTER = (
    *BATCH, "-M", "-o", "StrictHostKeyChecking=yes", "-o", "ControlPersist=no", "-o", "PermitLocalCommand=no",
    "-o", f"ServerAliveInterval={UNANSWERED / 3:.0f}", "-o", "ServerAliveCountMax=3", "-o", "ForwardAgent=no",
)  # fmt: skip
# without a master there shall be no other connection in its place
SESSION = (*BATCH, "-o", "ControlMaster=no", "-o", "ProxyCommand=exit 255")
REFUSED = re.compile(rb"mux_client_request_session|Session open refused")


class SshConnection(Connection):
    """A connection that a process of the user's ssh holds.

    Args:
        target: Where it goes.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._lost = False
        self._master: subprocess.Popen[bytes] | None = None
        self._forwarded: list[str] = []
        self._path = target.control_path
        if not (self._path and self._control("check").returncode == 0):
            self._folder = tempfile.TemporaryDirectory(prefix="gp-ssh-")
            self._path = f"{self._folder.name}/s"
            try:
                self._open(Path(self._folder.name, "said"))
            except BaseException:
                self.close()
                raise

    def _open(self, said: Path) -> None:
        argv = [
            "ssh",
            *MASTER,
            "-S",
            self._path,
            "-o",
            f"ConnectTimeout={self.target.timeout:.0f}",
            *self.target.by_ssh,
        ]
        with said.open("wb") as output:
            self._master = subprocess.Popen(
                [*argv, HOLD], stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
            )
        deadline = time.monotonic() + 3 * self.target.timeout  # to connect, to agree on keys, to be let in
        while not Path(self._path).exists():
            if self._master.poll() is not None:
                raise self._failure(said.read_text(errors="replace"))
            if time.monotonic() > deadline:
                raise ConnectionFailed(f"{self.target.name} does not let us in: ssh waits", UNREACHABLE)
            time.sleep(0.01)

    def _failure(self, said: str) -> ConnectionFailed:
        reason = next((reason for words, reason in REASONS.items() if words in said), UNREACHABLE)
        lines = [line.strip() for line in said.splitlines() if line.strip("@ \r")]
        return ConnectionFailed(f"{self.target.name}: {lines[-1] if lines else 'ssh gave no reason'}", reason)

    @property
    def is_open(self) -> bool:
        return not self._lost and (self._master is None or self._master.poll() is None)

    def run(self, line: str, data: bytes, timeout: float) -> Answer:
        deadline = time.monotonic() + timeout
        asked = line.encode("utf-8", "surrogateescape") + b"\n" + data
        while True:
            try:
                done = self._ssh(*SESSION, "-S", self._path, *self.target.by_ssh, COMMAND, asked=asked, until=deadline)
            except subprocess.TimeoutExpired:
                raise Unanswered(self.target.name, timeout) from None
            if done.returncode != 255:
                return Answer(done.returncode, done.stdout, done.stderr)
            if not REFUSED.search(done.stderr) or time.monotonic() > deadline - 0.1 or not self.is_open:
                self._lost = True
                raise ConnectionFailed(f"the connection to {self.target.name} is lost", UNREACHABLE)
            time.sleep(0.05)  # MaxSessions of the host may be smaller than ours

    def check(self) -> None:
        self.run("exit 0", b"", UNANSWERED)

    def forward(self, port: int, listener: Listener) -> int:
        host, there = listener.address
        end = f"[{host}]:{there}" if ":" in host else f"{host}:{there}"
        wanted = f"127.0.0.1:{port}:{end}"
        done = self._control("forward", "-R", wanted)
        if done.returncode:
            if self._control("check").returncode:
                self._lost = True  # of one that a person has opened, nobody else tells
                raise ConnectionFailed(f"the connection to {self.target.name} is lost", UNREACHABLE)
            raise BackendError(done.stderr.decode(errors="replace").strip() or "no reason is told")
        self._forwarded.append(wanted)  # in these words it is cancelled, too
        return port or int(done.stdout)

    def cancel(self, port: int) -> None:
        pass  # ssh cannot tell two ports from each other that were asked for as any

    def close(self) -> None:
        """End it, and what goes through it; one that a person has opened stays."""
        self._lost = True
        if self._master is None:
            for forwarded in self._forwarded:
                self._control("cancel", "-R", forwarded)
            return
        end_process(self._master)
        assert self._master.stdin is not None
        self._master.stdin.close()
        self._folder.cleanup()

    def _control(self, word: str, *more: str) -> subprocess.CompletedProcess[bytes]:
        argv = ("-O", word, "-S", self._path, *more, *self.target.by_ssh)
        try:
            return self._ssh(*argv, until=time.monotonic() + UNANSWERED)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(argv, 255, b"", b"the connection's own ssh does not answer")

    @staticmethod
    def _ssh(*argv: str, until: float, asked: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        rest = max(0.01, until - time.monotonic())
        # a session of its own: the terminal's Ctrl-C is the application's
        return subprocess.run(
            ["ssh", *argv], input=asked, capture_output=True, timeout=rest, start_new_session=True, check=False
        )
