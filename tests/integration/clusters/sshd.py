"""An sshd of the test's own on the loopback of this machine: one host, with this machine's files and this user."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from clusters.availability import Unavailable
from clusters.machine import Machine
from clusters.wan import Link

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin") or ""


class Sshd:
    """One host that is this machine.

    Args:
        link: The host has a network of its own, behind this line or on this machine; None: that of the tests.
        options: More lines of its configuration.

    Attributes:
        config: Of ssh, with the host as ``h1``, as ``h2`` through ``h1``, as ``h3`` through two, and as ``proxied``
            by a command.
    """

    def __init__(self, link: Link | Machine | None = None, *, options: str = "") -> None:
        self._link = link
        self._options = options
        self.folder = Path(tempfile.mkdtemp(prefix="gp-sshd-"))
        self.config = self.folder / "ssh_config"
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def up(self) -> None:
        """Make keys and configuration, and start it.

        Raises:
            Unavailable: There is no sshd here.
        """
        if not SSHD or not shutil.which("ssh-keygen"):
            raise Unavailable("no sshd: install openssh-server and openssh-client")
        Path("/run/sshd").mkdir(exist_ok=True)  # Debian's sshd wants it
        for name in ("host_key", "id"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)], check=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.folder.chmod(0o711)  # an sshd reads a user's keys as that user
        (self.folder / "sshd_config").write_text(
            f"{self._options}\n"
            f"ListenAddress {self._address}\nPort {self.port}\nHostKey {self.folder}/host_key\nPidFile none\n"
            f"StrictModes no\nAuthorizedKeysFile {self.folder}/id.pub\nUsePAM no\nPasswordAuthentication no\n"
            "MaxStartups 100\n"
        )
        public = " ".join((self.folder / "host_key.pub").read_text().split()[:2])
        (self.folder / "known_hosts").write_text(f"[{self._address}]:{self.port} {public}\n")
        self.config.write_text(
            "Host h2\n ProxyJump h1\nHost h3\n ProxyJump h1,h4\n"
            f"Host proxied\n ProxyCommand ssh -F {self.config} -W %h:%p h1 2>/dev/null || exit 3\n"
            f"Host h1 h2 h3 h4 proxied\n HostName {self._address}\n Port {self.port}\n IdentityFile {self.folder}/id\n"
            f" IdentitiesOnly yes\n UserKnownHostsFile {self.folder}/known_hosts\n GlobalKnownHostsFile none\n"
        )
        self.start()

    @property
    def _address(self) -> str:
        return self._link.far if self._link is not None else "127.0.0.1"

    def start(self) -> None:
        """Start the listener, and wait for it."""
        log = (self.folder / "log").open("ab")
        argv = [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")]
        argv = self._link.there(*argv) if self._link is not None else argv
        self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        log.close()
        deadline = time.monotonic() + 10
        while True:
            with suppress(OSError), socket.create_connection((self._address, self.port), 1) as peer:
                if peer.recv(4) == b"SSH-":
                    return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise Unavailable(f"sshd does not come up: {(self.folder / 'log').read_text()}")
            time.sleep(0.02)

    def sessions(self) -> list[int]:
        """Return the processes that serve connections."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return [int(pid) for pid in children]

    def kill_sessions(self) -> None:
        """Kill what serves connections; the listener stays, and so does what the sessions have started."""
        for pid in self.sessions():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End listener and sessions."""
        if self._process is not None:
            self.kill_sessions()
            self._process.kill()
            self._process.wait()
            self._process = None

    def down(self) -> None:
        """End everything and remove the files."""
        self.stop()
        shutil.rmtree(self.folder)
