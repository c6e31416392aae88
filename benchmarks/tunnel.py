"""`ssh -L` through an sshd of our own: what people do today to reach a kernel that is elsewhere."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

PATIENCE = 10.0  # seconds
SEPARATION = Path("/run/sshd")  # Debian's sshd does not start as root without this empty folder

CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
"""


class Missing(Exception):
    """There is no openssh here, or it does not work; the text names what."""


def free_port() -> int:
    """Return a port of this machine that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Sshd:
    """An sshd with host key, configuration and authorized key of its own.

    Args:
        folder: Made for all that it needs.

    Raises:
        Missing: See there.
    """

    def __init__(self, folder: Path) -> None:
        path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
        self._programs = {name: shutil.which(name, path=path) or "" for name in ("sshd", "ssh", "ssh-keygen")}
        absent = [name for name, found in self._programs.items() if not found]
        if absent:
            raise Missing(f"openssh is not here: no {', '.join(absent)}")
        folder.mkdir(mode=0o700)
        self._folder = folder
        self._clients: list[subprocess.Popen[bytes]] = []
        for name in ("host_key", "user_key"):
            made = [self._programs["ssh-keygen"], "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(made, check=True, stdin=subprocess.DEVNULL)
        self._port = free_port()
        host_key = (folder / "host_key.pub").read_text()
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{self._port} {host_key}")
        (folder / "config").write_text(CONFIG.format(port=self._port, folder=folder))
        if os.getuid() == 0:
            with contextlib.suppress(OSError):
                SEPARATION.mkdir(mode=0o755, exist_ok=True)
        arguments = ["-D", "-e", "-f", str(folder / "config")]
        self._server = self._run("sshd", arguments)
        self._until_open(self._port, self._server)

    def forward(self, ports: Mapping[str, int]) -> dict[str, int]:
        """Forward ports of this machine to others by one ssh, and return those to connect to.

        Raises:
            Missing: It does not come up.
        """
        own = {name: free_port() for name in ports}
        options = ["BatchMode=yes", "ExitOnForwardFailure=yes", f"UserKnownHostsFile={self._folder / 'known_hosts'}"]
        options += ["IdentitiesOnly=yes", "IdentityAgent=none", "ControlMaster=no", "ControlPath=none"]
        arguments = ["-F", "none", "-N", "-i", str(self._folder / "user_key"), "-p", str(self._port)]
        arguments += [part for option in options for part in ("-o", option)]
        arguments += [f"-L127.0.0.1:{own[name]}:127.0.0.1:{port}" for name, port in ports.items()]
        client = self._run("ssh", [*arguments, f"{getpass.getuser()}@127.0.0.1"])
        self._clients.append(client)
        for port in own.values():
            self._until_open(port, client)
        return own

    def close(self) -> None:
        """End clients and server."""
        for process in [*self._clients, self._server]:
            process.terminate()
            process.wait()

    def _run(self, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.log").open("ab") as log:
            argv = [self._programs[name], *arguments]
            return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _until_open(self, port: int, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.02)
        said = [line for log in sorted(self._folder.glob("*.log")) for line in log.read_text().splitlines()]
        raise Missing("openssh does not work here: " + (said[-1] if said else "it says nothing"))
