"""Hosts that are reached by ssh: machines with files and an sshd of their own."""

from __future__ import annotations

import shutil
import socket
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

from clusters.availability import Unavailable
from clusters.machine import Machine, check_available, run
from clusters.sshd import SSHD

HOME = "/home/gp"

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


class Host(Machine):
    """One host.

    Args:
        name: In the ssh configuration.
        folder: For its files.
        options: More lines for its sshd's configuration.
    """

    def __init__(self, name: str, folder: Path, options: str) -> None:
        super().__init__(name, folder, BOOT.replace("@SSHD@", SSHD))
        self._options = options

    def up(self) -> None:
        """Boot it, with new files."""
        (self.folder / "boot_id").write_text(f"{uuid.uuid4()}\n")
        super().up()

    def answers(self) -> bool:
        """Whether its sshd is up."""
        with suppress(OSError), socket.create_connection((self.address, 22), 1) as peer:
            return peer.recv(4) == b"SSH-"
        return False

    def configure(self) -> str:
        """Make its key and its sshd's configuration; returns the public key."""
        self.folder.mkdir()
        (self.folder / "files").mkdir()
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "host_key"))
        (self.folder / "sshd_config").write_text(
            f"{self._options}\n"  # the first of equal ones counts
            "HostKey /run/host_key\nPidFile /run/sshd.pid\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
            "PermitRootLogin prohibit-password\nUseDNS no\nMaxStartups 100\n"
        )
        return " ".join((self.folder / "host_key.pub").read_text().split()[:2])

    def stop_sshd(self) -> None:
        """Kill the listener; sessions go on."""
        self.inside("sh", "-c", "kill -KILL $(cat /run/sshd.pid)")

    def start_sshd(self) -> None:
        """Start it again."""
        self.inside(SSHD, "-f", "/run/sshd_config", "-E", "/run/sshd.log")

    def kill_sessions(self) -> None:
        """Kill what serves connections."""
        self.inside("pkill", "-KILL", "-f", "^sshd: [^/]", check=False)

    def processes(self) -> list[str]:
        """Command lines of all that runs there, but the host's own."""
        every = self.inside("ps", "-eo", "pid=,args=").splitlines()
        own = ("sshd", "ps -eo", "sleep 3600", "bash -c read")
        return [line for line in every if not line.split(maxsplit=1)[1].startswith(own) and SSHD not in line]


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
        check_available({})
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
