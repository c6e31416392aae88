"""Kernelspec folders of real kernels, chosen for how they take an interrupt.

| function      | kernel          | interrupt                      | comes from                   |
|---------------|-----------------|--------------------------------|------------------------------|
| `ipykernel`   | Python          | signal                         | the environment of the tests |
| `irkernel`    | R               | signal                         | Debian: r-cran-irkernel      |
| `jjava`       | Java (two JVMs) | message                        | PyPI, and a JDK              |
| `xeus_python` | Python in C++   | signal, of which it **dies**   | PyPI                         |

Each returns a folder with a `kernel.json` that starts the kernel on this machine without gp. `jjava`'s argv
starts a small JVM that starts the kernel proper: who kills only the first leaves the second behind.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from clusters.availability import Unavailable
from clusters.kernels.cache import cached

JJAVA_VERSION = "1.0a8"
XEUS_PYTHON_VERSION = "0.19.0"

_IRKERNEL_SPEC = Path("/usr/share/jupyter/kernels/ir")
_INSTALL_TIMEOUT = 600
"""Seconds for pip, on a slow line."""


def ipykernel() -> Path:
    """The kernel that every other one is compared with, in the interpreter that runs the tests."""

    def build(folder: Path) -> None:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        _write_spec(folder, {"argv": argv, "display_name": "Python", "language": "python"})

    # The interpreter's path is part of the spec, so it is part of the name.
    return cached("ipykernel-" + sys.prefix.strip("/").replace("/", "-"), build)


def irkernel() -> Path:
    """IRkernel from Debian; interrupted by SIGINT, of which the cell's output says nothing.

    Raises:
        Unavailable: It is not installed.
    """
    if shutil.which("R") is None or not (_IRKERNEL_SPEC / "kernel.json").exists():
        raise Unavailable("needs: apt-get install --no-install-recommends r-cran-irkernel")
    return _IRKERNEL_SPEC


def jjava() -> Path:
    """The Java kernel from PyPI, interrupted by a message on its control channel.

    Raises:
        Unavailable: There is no JDK, or the package cannot be had.
    """
    if shutil.which("java") is None:
        raise Unavailable("needs: apt-get install --no-install-recommends openjdk-17-jdk-headless")

    def build(folder: Path) -> None:
        # The wheel is two jar files and a kernelspec. The environment is for its pip, which ours may lack.
        _make_venv(folder / "venv")
        _pip(str(folder / "venv/bin/python"), "--no-deps", f"jjava=={JJAVA_VERSION}")
        shutil.move(folder / "venv/share/jupyter/kernels/java", folder / "spec")
        shutil.rmtree(folder / "venv")

    return cached(f"jjava-{JJAVA_VERSION}", build) / "spec"


def xeus_python() -> Path:
    """The C++ Python kernel from PyPI, which ends with a signal where others stop their cell.

    Raises:
        Unavailable: The package cannot be had, or there is none for this Python and machine.
    """

    def build(folder: Path) -> None:
        _make_venv(folder / "venv")
        python = folder / "venv/bin/python"
        # Wheels only: from source it would be a C++ build of minutes.
        _pip(str(python), "--only-binary=:all:", f"xeus-python=={XEUS_PYTHON_VERSION}")
        shutil.copytree(folder / "venv/share/jupyter/kernels/xpython", folder / "spec")
        spec = json.loads((folder / "spec/kernel.json").read_text())
        # The wheel says "python3.11", which jupyter_client replaces by the client's own interpreter.
        spec["argv"][0] = str(python)
        _write_spec(folder / "spec", spec)

    version = platform.python_version()
    return cached(f"xeus-python-{XEUS_PYTHON_VERSION}-py{version}", build) / "spec"


def _write_spec(folder: Path, spec: dict[str, Any]) -> None:
    (folder / "kernel.json").write_text(json.dumps(spec, indent=1))


def _make_venv(folder: Path) -> None:
    # From the base interpreter: an environment made inside a test environment would go with that.
    base = getattr(sys, "_base_executable", sys.executable)
    done = subprocess.run([base, "-m", "venv", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"needs: apt-get install python3-venv (python -m venv: {done.stdout.strip()})")


def _pip(python: str, *arguments: str) -> None:
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
        timeout=_INSTALL_TIMEOUT,
    )
    if done.returncode:
        raise Unavailable(f"needs: {arguments[-1]} from PyPI: {done.stderr.strip()[-500:]}")
