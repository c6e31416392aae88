"""Hosts that are reached by ssh: each has its own network, processes, name, files and sshd, on this machine's kernel.

Nothing of them can be left behind: their namespaces have no names and end with their first process, which ends with
the thread that started it; the near end of a host's line has this process's id in its name and goes with the host.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path

from clusters.availability import Unavailable
from clusters.sshd import SSHD
from clusters.wan.link import free_network

TOOLS = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux", "ps": "procps"}
HOME = "/home/gp"
STARTED = 20.0
"""Seconds for a host to come up, on a busy machine."""

BOOT = """
set -e
cd "$1"; hostname "$2"
mount -t tmpfs tmpfs files; mkdir files/upper files/work files/root
mount -t overlay overlay -o lowerdir=/,upperdir=files/upper,workdir=files/work files/root
mount --rbind /dev files/root/dev; mount -t proc proc files/root/proc; mount -t tmpfs -o mode=755 tmpfs files/root/run
mount --bind boot_id files/root/proc/sys/kernel/random/boot_id
mkdir -p files/root/run/sshd files/root@HOME@/.ssh; chmod 700 files/root@HOME@ files/root@HOME@/.ssh
cp host_key sshd_config files/root/run/; cp ../id.pub files/root@HOME@/.ssh/authorized_keys
sed -i 's,^root:.*,root:x:0:0:root:@HOME@:/bin/bash,' files/root/etc/passwd
cd files/root; mkdir -p .old; pivot_root . .old; umount -l /.old
ip link set lo up
trap : TERM
@SSHD@ -f /run/sshd_config -E /run/sshd.log
while :; do sleep 3600 & wait $! || :; done
""".replace("@HOME@", HOME)


class Host:
    """One host.

    Args:
        name: In the ssh configuration.
        folder: For its files.
        options: More lines for its sshd's configuration.
    """

    def __init__(self, name: str, folder: Path, options: str) -> None:
        self.name = name
        self.address = self.near = ""
        self._folder = folder
        self._options = options
        self._device = f"gp{os.getpid()}{name}"
        self._process: subprocess.Popen[bytes] | None = None

    def up(self) -> None:
        """Boot it."""
        (self._folder / "boot_id").write_text(f"{uuid.uuid4()}\n")
        script = BOOT.replace("@SSHD@", SSHD)
        with (self._folder / "console").open("ab") as console:
            self._process = subprocess.Popen(
                # the first process of the namespaces waits for its line before it does anything
                [
                    *("setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--uts", "--ipc", "--pid"),
                    *("--fork", "--kill-child=KILL", "--propagation", "private"),
                    *("bash", "-c", f"read -r _; {script}", "boot", str(self._folder), self.name),
                ],
                env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},  # of no test's gp
                stdin=subprocess.PIPE,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        deadline = time.monotonic() + STARTED
        while not self._first():
            self._must_live(deadline)
        near, far = self._line()
        run("ip", "link", "add", self._device, "type", "veth", "peer", "name", "eth0", "netns", str(self._first()))
        run("ip", "address", "add", f"{near}/24", "dev", self._device)
        run("ip", "link", "set", self._device, "up")
        self._network("ip", "address", "add", f"{far}/24", "dev", "eth0")
        self._network("ip", "link", "set", "eth0", "up")
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        self._process.stdin.close()
        while not self._answers():
            self._must_live(deadline)

    def configure(self) -> str:
        """Make its key and its sshd's configuration; returns the public key."""
        self._folder.mkdir()
        (self._folder / "files").mkdir()
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._folder / "host_key"))
        (self._folder / "sshd_config").write_text(
            f"{self._options}\n"  # the first of equal ones counts
            "HostKey /run/host_key\nPidFile /run/sshd.pid\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
            "PermitRootLogin prohibit-password\nUseDNS no\nMaxStartups 100\n"
        )
        return " ".join((self._folder / "host_key.pub").read_text().split()[:2])

    def power_off(self) -> None:
        """End everything at once: nobody hears of it."""
        self.partition(True)
        self.down()

    def reboot(self) -> None:
        """End everything and boot again, with the same address and with new files."""
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

    # -- faults

    def partition(self, now: bool) -> None:
        """Cut its line, or mend it."""
        run("ip", "link", "set", self._device, "down" if now else "up")

    def freeze(self, now: bool) -> None:
        """Stop all its processes, or let them go on."""
        self.inside("kill", f"-{'STOP' if now else 'CONT'}", "-1", check=False)

    def stop_sshd(self) -> None:
        """Kill the listener; sessions go on."""
        self.inside("sh", "-c", "kill -KILL $(cat /run/sshd.pid)")

    def start_sshd(self) -> None:
        """Start it again."""
        self.inside(SSHD, "-f", "/run/sshd_config", "-E", "/run/sshd.log")

    def kill_sessions(self) -> None:
        """Kill what serves connections."""
        self.inside("pkill", "-KILL", "-f", "^sshd: [^/]", check=False)

    # -- what is there

    def inside(self, *argv: str, check: bool = True) -> str:
        """Run a command on the host, not by ssh, and return its output."""
        return run("nsenter", "-t", str(self._first()), "-a", *argv, check=check)

    def processes(self) -> list[str]:
        """Command lines of all that runs there, but the host's own."""
        every = self.inside("ps", "-eo", "pid=,args=").splitlines()
        own = ("sshd", "ps -eo", "sleep 3600", "bash -c read")
        return [line for line in every if not line.split(maxsplit=1)[1].startswith(own) and SSHD not in line]

    # -- parts

    def _first(self) -> int:
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

    def _network(self, *argv: str) -> None:
        run("nsenter", "-t", str(self._first()), "--net", *argv)

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection((self.address, 22), 1) as peer:
            return peer.recv(4) == b"SSH-"
        return False

    def _must_live(self, deadline: float) -> None:
        assert self._process is not None
        if self._process.poll() is not None or time.monotonic() > deadline:
            raise Unavailable(f"{self.name} does not come up: {(self._folder / 'console').read_text()}")
        time.sleep(0.02)


class SshHosts:
    """Several hosts, called h1, h2, and so on.

    Args:
        options: More lines for the sshd's configuration of each.

    Attributes:
        config: Of ssh, with all of them.
    """

    def __init__(self, *options: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gp-hosts-"))
        self.folder.chmod(0o755)
        self.config = self.folder / "ssh_config"
        self.hosts = {f"h{n}": Host(f"h{n}", self.folder / f"h{n}", more) for n, more in enumerate(options, 1)}

    def up(self) -> None:
        """Boot all.

        Raises:
            Unavailable: That cannot be here.
        """
        if os.geteuid() != 0:
            raise Unavailable("needs: root, for namespaces")
        if missing := [package for tool, package in TOOLS.items() if shutil.which(tool) is None]:
            raise Unavailable(f"needs: apt-get install {' '.join(missing)}")
        if not SSHD:
            raise Unavailable("needs: apt-get install openssh-server")
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "id"))
        known = []
        for host in self.hosts.values():
            public = host.configure()
            host.up()
            known.append(f"{host.address} {public}\n")
        (self.folder / "known_hosts").write_text("".join(known))
        self.config.write_text(
            "".join(f"Host {host.name}\n HostName {host.address}\n" for host in self.hosts.values())
            + f"Host *\n User root\n IdentityFile {self.folder}/id\n IdentitiesOnly yes\n ConnectTimeout 5\n"
            f" UserKnownHostsFile {self.folder}/known_hosts\n GlobalKnownHostsFile none\n"
        )

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def down(self) -> None:
        """End all and remove the files."""
        for host in self.hosts.values():
            host.down()
        shutil.rmtree(self.folder)


def run(*argv: str, check: bool = True) -> str:
    """Run a command and return its output."""
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout
