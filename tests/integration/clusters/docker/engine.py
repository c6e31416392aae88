"""Docker engines: each is the only thing on a machine of its own, and what it starts ends with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import docker
from docker.errors import DockerException
from requests import RequestException

from clusters.availability import offer
from clusters.docker.certificates import make_certificates
from clusters.docker.image import SETTINGS, python_image
from clusters.kernels.peer import bootstrap
from clusters.machine import Machine, check_available, run
from clusters.wan.link import free_network

IMAGE = "127.0.0.1:5000/kernel:1"
"""The image of every engine: ipykernel, and nothing of gp. Its registry refuses at once, as a Swarm asks it first."""

DOCKERD = os.environ.get("GP_TEST_DOCKERD") or "dockerd"
"""Program; what lies beside it is used with it."""

BOOT = """
set -e
cd "$1"; hostname "$2"
mount -t proc proc /proc
[ -z "@DISK@" ] || { mkdir data; mount -t tmpfs -o "size=@DISK@" tmpfs data; }
ip link set lo up
echo 1 >/proc/sys/net/ipv4/ip_forward  # before the engine: it would set the policy of FORWARD to DROP
trap : TERM
sh ./start
while :; do sleep 3600 & wait $! || :; done
"""
CGROUPS = Path("/sys/fs/cgroup")


def hides_ports() -> bool:
    """Return whether the engine drops what other machines send to ports that are not published: from 28 on it does."""
    if shutil.which(DOCKERD) is None:
        return False
    known = subprocess.run([DOCKERD, "--help"], capture_output=True, check=True)
    return b"--allow-direct-routing" in known.stdout


class Engine(Machine):
    """One engine.

    Args:
        name: Of its machine.
        folder: For its files; short, because paths of sockets are.
        options: More options for it.
        disk: Size of a disk of its own, in memory.
        tls: It listens at `tcp`, too, to who has a certificate.

    Attributes:
        certificates: Folder with what `tcp` asks for, as ``DOCKER_CERT_PATH`` has it.
    """

    def __init__(self, name: str, folder: Path, *options: str, disk: str = "", tls: bool = False) -> None:
        super().__init__(name, folder, BOOT.replace("@DISK@", disk))
        self._tls = tls
        self.certificates = folder / "client"
        self._options = options
        self._parent = f"gp-{os.getpid()}-{name}"
        self.url = f"unix://{folder}/docker.sock"

    def up(self, *, images: bool = True) -> None:
        """Start it, with the image.

        Raises:
            Unavailable: That cannot be here.
        """
        check_available({DOCKERD: "docker.io", "iptables": "iptables"})
        self.folder.mkdir(exist_ok=True)
        (self.folder / "docker.pid").unlink(missing_ok=True)  # what a boot clears
        shutil.rmtree(self.folder / "exec", ignore_errors=True)
        super().up()
        if images:
            with self.client() as client:
                client.import_image(str(python_image("ipykernel")), *IMAGE.rsplit(":", 1), changes=list(SETTINGS))

    def wired(self) -> None:
        bridge = free_network()  # now that the line has its own
        options = {
            "host": self.url,
            "data-root": self.folder / "data",
            "exec-root": self.folder / "exec",
            "pidfile": self.folder / "docker.pid",
            "bip": f"{bridge[1]}/24",
            "cgroup-parent": f"/{self._parent}",
        }
        words = " ".join([*(f"--{name}={value}" for name, value in options.items()), *self._options, *self._secured()])
        beside = f"PATH={os.path.dirname(DOCKERD)}:$PATH; " if "/" in DOCKERD else ""  # its runc
        start = f"exec </dev/null >>engine.log 2>&1; {beside}setsid {DOCKERD} {words} &\n"
        (self.folder / "start").write_text(start)
        self.network("ip", "route", "add", "default", "via", self.near)
        run("ip", "route", "add", str(bridge), "via", self.address)

    def _secured(self) -> list[str]:
        if not self._tls:
            return []
        own = self.folder / "server"
        make_certificates(self.address, own, self.certificates)
        files = [f"--tls{name}={own}/{file}.pem" for name, file in (("cacert", "ca"), ("cert", "cert"), ("key", "key"))]
        return [f"--host={self.tcp}", "--tlsverify", *files]

    @property
    def tcp(self) -> str:
        """Its address for TLS."""
        return f"tcp://{self.address}:2376"

    def answers(self) -> bool:
        with suppress(DockerException, RequestException), self.client() as client:
            return bool(client.ping())
        return False

    def client(self) -> docker.APIClient:
        """Return a client of it."""
        return docker.APIClient(self.url, version="1.41", timeout=60)

    def image(
        self, name: str, *lines: str, files: Mapping[str, Path] | None = None, base: str = IMAGE, **arguments: str
    ) -> str:
        """Build an image.

        Args:
            name: Short.
            lines: Of its Dockerfile.
            files: Files and folders for ``COPY``, by their names there.
            base: What it is built on; empty: the lines say so.
            arguments: For the build.

        Returns:
            Its whole name.
        """
        full = f"127.0.0.1:5000/{name}:1"
        with tempfile.TemporaryDirectory() as folder:
            for file, path in (files or {}).items():
                (shutil.copytree if path.is_dir() else shutil.copy)(path, Path(folder, file))
            Path(folder, "Dockerfile").write_text("\n".join([*([f"FROM {base}"] if base else []), *lines]))
            with self.client() as client:
                said = []
                for told in client.build(
                    path=folder, tag=full, buildargs=arguments, decode=True, rm=True, forcerm=True
                ):
                    said.append(told.get("stream", ""))
                    if "error" in told:
                        raise RuntimeError(f"{told['error']}: {''.join(said)[-2000:]}")
        return full

    def peer_image(self, packages: Path) -> str:
        """Build the image of a Python kernel of the peer's.

        Args:
            packages: Where the peer is installed.
        """
        with tempfile.TemporaryDirectory() as folder:
            files = bootstrap(packages, Path(folder))
            flat = {place.replace("/", "-"): path for place, path in files.items()}
            copied = [f"COPY {name} /usr/local/{place}" for name, place in zip(flat, files, strict=True)]
            started = 'CMD ["/bin/bash", "/usr/local/bin/bootstrap-kernel.sh"]'
            return self.image("peer", *copied, "ENV KERNEL_LANGUAGE=python", started, files=flat)

    # -- faults

    def kill_daemon(self) -> None:
        """Kill the engine; containers go with it or live on, as it is configured."""
        with suppress(OSError):
            pid = int((self.folder / "docker.pid").read_text())
            self.inside("kill", "-KILL", str(pid), check=False)
        deadline = time.monotonic() + 10
        while self.answers() and time.monotonic() < deadline:
            time.sleep(0.02)

    def start_daemon(self) -> None:
        """Start it again."""
        (self.folder / "docker.pid").unlink(missing_ok=True)
        clean = ("env", "-i", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")  # of no test's gp
        self.inside(*clean, "sh", "-c", f"cd {self.folder} && sh ./start")
        deadline = time.monotonic() + 60
        while not self.answers():
            if time.monotonic() > deadline:
                raise RuntimeError(f"the engine does not come up: {(self.folder / 'engine.log').read_text()[-2000:]}")
            time.sleep(0.05)

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """An engine whose socket accepts and that never answers."""
        pid = (self.folder / "docker.pid").read_text()
        self.inside("kill", "-STOP", pid)
        try:
            yield
        finally:
            self.inside("kill", "-CONT", pid)

    # -- what is there

    def counts(self) -> dict[str, int]:
        """What exists, by kind."""
        with self.client() as client:
            found: dict[str, Any] = {
                "containers": client.containers(all=True),
                "volumes": client.volumes()["Volumes"] or [],
                "networks": client.networks(),
            }
            if client.info()["Swarm"]["ControlAvailable"]:
                found |= {"services": client.services(), "configs": client.configs(), "secrets": client.secrets()}
        return {kind: len(some) for kind, some in found.items()}

    def down(self) -> None:
        super().down()
        for root in CGROUPS.glob(f"*/{self._parent}"), CGROUPS.glob(self._parent):
            for top in root:
                for folder, _, _ in os.walk(top, topdown=False):
                    with suppress(OSError):
                        os.rmdir(folder)

    def remove(self) -> None:
        """End it and delete its files."""
        self.down()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def offered(name: str, *options: str, disk: str = "", tls: bool = False) -> Iterator[Engine]:
    """Have an engine for the time of a block; takes what `Engine` does."""
    folder = Path(tempfile.mkdtemp(prefix="gp-docker-"))
    made = Engine(name, folder / name, *options, disk=disk, tls=tls)
    try:
        offer("docker", made.up)
        yield made
    finally:
        made.remove()
        folder.rmdir()


class Swarm:
    """Several engines as one Swarm: n1 manages, the others work; a line of their own joins them."""

    def __init__(self, size: int = 2) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gp-docker-"))
        self.engines = [Engine(f"n{number}", self.folder / f"n{number}") for number in range(1, size + 1)]
        self.manager = self.engines[0]

    def up(self) -> None:
        """Start all.

        Raises:
            Unavailable: That cannot be here.
        """
        for engine in self.engines:
            engine.up()
        self._between = free_network()
        self.manager.network("ip", "link", "add", "between", "type", "bridge")
        self.manager.network("ip", "address", "add", f"{self._between[1]}/24", "dev", "between")
        self.manager.network("ip", "link", "set", "between", "up")
        with self.manager.client() as client:
            client.init_swarm(advertise_addr=f"{self._between[1]}", default_addr_pool=["10.189.0.0/16"])
            token = client.inspect_swarm()["JoinTokens"]["Worker"]
        for engine in self.engines[1:]:
            self.wire(engine)
            with engine.client() as client:
                client.join_swarm(
                    [f"{self._between[1]}:2377"],
                    token,
                    listen_addr="0.0.0.0:2377",
                    advertise_addr=self._address(engine),
                )

        deadline = time.monotonic() + 30
        with self.manager.client() as client:
            while not {"ingress", "docker_gwbridge"} <= {one["Name"] for one in client.networks()}:  # they come later
                if time.monotonic() > deadline:
                    raise RuntimeError("the Swarm makes no networks")
                time.sleep(0.1)

    def wire(self, engine: Engine) -> None:
        """Join a worker's machine to the manager's by a line of their own."""
        bridge, first = "between", self.manager
        number = self.engines.index(engine) + 1
        end = f"to{number}"
        run(
            "ip",
            "link",
            "add",
            end,
            "netns",
            str(first.first),
            "type",
            "veth",
            "peer",
            "name",
            "to1",
            "netns",
            str(engine.first),
        )
        first.network("ip", "link", "set", end, "master", bridge)
        first.network("ip", "link", "set", end, "up")
        engine.network("ip", "address", "add", f"{self._address(engine)}/24", "dev", "to1")
        engine.network("ip", "link", "set", "to1", "up")

    def _address(self, engine: Engine) -> str:
        return f"{self._between[self.engines.index(engine) + 1]}"

    @contextmanager
    def paused(self, engine: Engine) -> Iterator[None]:
        """A node that takes no new tasks."""
        self._availability(engine, "pause")
        try:
            yield
        finally:
            self._availability(engine, "active")

    def _availability(self, engine: Engine, now: str) -> None:
        with self.manager.client() as client:
            (node,) = client.nodes(filters={"name": engine.name})
            client.update_node(node["ID"], node["Version"]["Index"], {**node["Spec"], "Availability": now})

    def down(self) -> None:
        """End all."""
        for engine in self.engines:
            engine.remove()
        shutil.rmtree(self.folder, ignore_errors=True)
