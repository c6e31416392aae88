"""Who is compared: our embedded backend, jupyter_client's local provisioner, and the peer from PyPI."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from harness import PROGRAMS, Failed, Program

PEER = "gateway_provisioners==0.5.0"
MARK = "GATEWAY_BENCHMARK"  #: environment variable
NAMES = ("ours", "local", "peer")
STANZAS: dict[str, dict[str, Any]] = {
    "ours": {"provisioner_name": "gp-local-provisioner"},
    "local": {"provisioner_name": "local-provisioner"},
    "peer": {"provisioner_name": "distributed-provisioner", "config": {"remote_hosts": ["localhost"]}},
}


def peer_python() -> str:
    """Return the interpreter of the peer's environment, made at the first call.

    The peer claims provisioner names that ours may claim too, so it lives alone, outside of the checkout.
    GP_BENCH_PEER_PYTHON names an environment that exists already.
    """
    if given := os.environ.get("GP_BENCH_PEER_PYTHON"):
        return given
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gp-benchmarks"
    folder = cache / f"{PEER.replace('==', '-')}-docker-py{sys.version_info[0]}.{sys.version_info[1]}"
    python = folder / "bin/python"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", PEER, "docker", *_same_versions()], check=True)
        (folder / "complete").touch()
    return str(python)


def _same_versions() -> list[str]:
    """The libraries that all have in common shall not make the difference."""
    from importlib.metadata import version

    return [f"{name}=={version(name)}" for name in ("ipykernel", "jupyter_client", "pyzmq", "tornado")]


class Contestant:
    """A host application with kernelspecs of its own, in an environment of its own.

    Args:
        name: One of `NAMES`.
        work: Folder for all that it writes.
        stanza: Of its kernelspecs; None: that of `STANZAS`.
        env: Of the host application, on top of what all have.
    """

    def __init__(
        self, name: str, work: Path, stanza: dict[str, Any] | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self._env = dict(env or {})
        self.folder = work / name
        self.python = peer_python() if name == "peer" else sys.executable
        for part in ("config", "run", "logs", "ipython"):
            (self.folder / part).mkdir(parents=True, mode=0o700)
        self.kernels = self._kernels()
        for kernel, argv in self.kernels.items():
            self.install(kernel, argv, stanza or STANZAS[name])
        self.install("nothing", ["none"], {"provisioner_name": "null"})
        self.host = self._started()

    def _started(self) -> Program:
        return Program("host", self.folder / "log", python=self.python, env=self._environment())

    def renew(self) -> None:
        """Kill the host and all that it has started, and start another."""
        self.host.kill()
        self.sweep()
        self.host = self._started()

    def forget(self) -> None:
        """End all kernels of the host."""
        try:
            # politely, and the peer would need up to half a minute for each
            self.host.ask("abandon" if self.name == "peer" else "forget")
            if self.name == "peer":
                self.sweep()
        except Failed as error:
            print(f"{self.name} has to be killed: {error}", file=sys.stderr)
            self.renew()

    def sweep(self) -> None:
        """Kill what the host has started and left behind, as far as it has our mark in its environment."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != self.host.pid and process.environ().get(MARK) == str(self.folder):
                    process.kill()

    def close(self) -> None:
        """End the host; nothing remains."""
        self.host.close()
        self.sweep()

    def _kernels(self) -> dict[str, list[str]]:
        stillborn = [self.python, "-I", "-S", "-c", "raise SystemExit('this kernel dies at once')"]
        if self.name != "peer":
            return {
                "ipykernel": [self.python, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                "instant": [self.python, "-I", "-S", str(PROGRAMS / "instant_kernel.py"), "{connection_file}"],
                "stillborn": stillborn,
            }
        launch = self._assembled()
        options = ["--kernel-id", "{kernel_id}", "--response-address", "{response_address}"]
        options += ["--public-key", "{public_key}"]
        return {
            "ipykernel": [self.python, str(launch / "launch_ipykernel.py"), "--port-range", "{port_range}", *options],
            "instant": [self.python, str(PROGRAMS / "instant_peer.py"), *options],
            "stillborn": stillborn,
        }

    def _assembled(self) -> Path:
        """Put the peer's launcher together as its `jupyter ssh-spec install` does."""
        find = "import gateway_provisioners; print(gateway_provisioners.__path__[0])"
        found = subprocess.run([self.python, "-c", find], check=True, capture_output=True, text=True)
        parts = Path(found.stdout.strip()) / "kernel-launchers"
        launch = self.folder / "launch"
        shutil.copytree(parts / "python/scripts", launch)
        shutil.copy(parts / "shared/scripts/server_listener.py", launch)
        return launch

    def install(self, kernel: str, argv: list[str], stanza: dict[str, Any]) -> None:
        """Write a kernelspec."""
        folder = self.folder / "data/kernels" / kernel
        folder.mkdir(parents=True)
        metadata = {"kernel_provisioner": stanza}
        # the peer's own kernel looks for its listener; on another host it has only this environment
        env = {"PYTHONPATH": self._launch_path()} if self.name == "peer" else {}
        spec = {"argv": argv, "display_name": kernel, "language": "python", "metadata": metadata, "env": env}
        (folder / "kernel.json").write_text(json.dumps(spec))

    def _environment(self) -> dict[str, str]:
        ours = ("GP_", "JUPYTER_", "PYTHON", "KERNEL_", "COVERAGE_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        env |= {
            "JUPYTER_DATA_DIR": str(self.folder / "data"),
            "JUPYTER_CONFIG_DIR": str(self.folder / "config"),
            "JUPYTER_RUNTIME_DIR": str(self.folder / "run"),
            MARK: str(self.folder),
            "IPYTHONDIR": str(self.folder / "ipython"),
        }
        if self.name == "ours":
            env |= {"GP_DATA_DIR": str(self.folder / "gp"), "GP_RESPONSE_PORT": "0"}
        elif self.name == "peer":
            env |= {"GP_KERNEL_LOG_DIR": str(self.folder / "logs"), "PYTHONPATH": self._launch_path()}
            # it has no "any port", and by default it refuses root
            env |= {"GP_RESPONSE_PORT": str(_free_port()), "GP_UNAUTHORIZED_USERS": "nobody"}
        return env | self._env

    def _launch_path(self) -> str:
        return os.pathsep.join([str(self.folder / "launch"), str(PROGRAMS)])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
