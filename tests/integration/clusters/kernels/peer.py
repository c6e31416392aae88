"""gateway_provisioners from PyPI: its own environment, and a kernelspec made by its own tool."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from string import Template

from clusters.availability import Unavailable
from clusters.kernels.cache import cached

VERSION = "0.5.0"
SPEC = "peer_ssh"


@dataclass(frozen=True)
class Peer:
    """The peer.

    Args:
        folder: Holds a virtual environment with it and with ipykernel, and kernelspecs in ``share/jupyter``.
    """

    folder: Path

    @property
    def python(self) -> Path:
        """The interpreter that has what its launcher imports."""
        return self.folder / "venv/bin/python"

    @property
    def spec(self) -> Path:
        """Folder of the kernelspec that ``jupyter ssh-spec install`` has made for the host ``h1``."""
        return self.folder / "share/jupyter/kernels" / SPEC

    def docker_spec(self, image: str, prefix: Path) -> Path:
        """Return the folder of a kernelspec that ``jupyter docker-spec install`` makes.

        Args:
            image: Its image.
            prefix: Folder for it.
        """
        tool = (str(self.folder / "venv/bin/jupyter"), "docker-spec", "install", "--prefix", str(prefix))
        _run(*tool, "--kernel-name", "peer_docker", "--image-name", image, missing="the tool of gateway_provisioners")
        return prefix / "share/jupyter/kernels/peer_docker"

    @property
    def packages(self) -> Path:
        """Where it is installed."""
        (found,) = self.folder.glob("venv/lib/python3*/site-packages")
        return found


def bootstrap(packages: Path, folder: Path) -> dict[str, Path]:
    """Return what an image needs besides ipykernel for the peer's kernels, by its place below ``/usr/local``.

    ``jupyter image-bootstrap install`` does that, inside of an image and for root only.

    Args:
        packages: Where the peer is installed.
        folder: For what is written.
    """
    launchers = packages / "gateway_provisioners/kernel-launchers"
    script = Template((launchers / "bootstrap/bootstrap-kernel.sh").read_text())
    (folder / "bootstrap-kernel.sh").write_text(script.safe_substitute(install_dir="/usr/local/bin"))
    return {
        "bin/bootstrap-kernel.sh": folder / "bootstrap-kernel.sh",
        "bin/kernel-launchers/python/scripts/launch_ipykernel.py": launchers / "python/scripts/launch_ipykernel.py",
        "bin/kernel-launchers/python/scripts/server_listener.py": launchers / "shared/scripts/server_listener.py",
        f"lib/{packages.parent.name}/site-packages/Cryptodome": packages / "Cryptodome",
    }


def peer() -> Peer:
    """Install it, once.

    Raises:
        Unavailable: There is no venv, or no PyPI.
    """

    def build(folder: Path) -> None:
        base = getattr(sys, "_base_executable", sys.executable)  # our own environment may go before the cache does
        _run(base, "-m", "venv", str(folder / "venv"), missing="apt-get install python3-venv")
        bin_ = folder / "venv/bin"
        wanted = [f"gateway_provisioners=={VERSION}", "ipykernel"]
        pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        _run(str(bin_ / "python"), *pip, *wanted, missing=f"{' '.join(wanted)} from PyPI")
        tool = (str(bin_ / "jupyter"), "ssh-spec", "install", "--prefix", str(folder), "--kernel-name", SPEC)
        _run(*tool, "--remote-hosts", "h1", missing="the tool of gateway_provisioners")

    version = ".".join(map(str, sys.version_info[:3]))
    return Peer(cached(f"gateway-provisioners-{VERSION}-whole-py{version}", build))


def _run(*argv: str, missing: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise Unavailable(f"needs: {missing}: {(done.stderr or done.stdout).strip()[-500:]}")
