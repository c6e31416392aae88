"""The images of deploy/images, built on this machine's Python: a server in a container, and its kernels beside it."""

from __future__ import annotations

import ensurepip
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from clusters.docker import Engine
from clusters.docker.image import SETTINGS, python_image
from support.installation import wait_until
from support.servers import STARTED, Server

pytestmark = [pytest.mark.timeout(600), pytest.mark.relay]

ROOT = Path(__file__).parents[2]
SERVER = ("jupyterlab", "cryptography", "docker", "paramiko", "pluggy", "psutil", "requests", "rich", "urllib3")
"""What the wheels and the Dockerfile of the server's image ask PyPI for; an engine of the tests does not reach it."""


PIP = r"""printf '#!/bin/sh\nexec python3 /usr/local/lib/pip.whl/pip "$@"\n'"""


@pytest.fixture(scope="module")
def images(engine: Engine) -> Iterator[tuple[str, str]]:
    """The two images: of kernels, of the server."""
    before = set(names(engine))
    with engine.client() as client:
        client.import_image(str(python_image(*SERVER)), "127.0.0.1:5000/lab", "1", changes=list(SETTINGS))
    (pip,) = (Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl")
    add_pip = ("COPY pip.whl /usr/local/lib/", f"RUN {PIP} > /usr/local/bin/pip && chmod 755 /usr/local/bin/pip")
    bases = {
        "kernel-python": engine.image("base-kernel", *add_pip, files={"pip.whl": pip}),
        "jupyter-server": engine.image("base-server", *add_pip, files={"pip.whl": pip}, base="127.0.0.1:5000/lab:1"),
    }
    with tempfile.TemporaryDirectory() as folder:
        wheels = {path.name: path for path in made_wheels(Path(folder))}
        yield tuple(
            engine.image(
                name,
                *(ROOT / "deploy/images" / name / "Dockerfile").read_text().splitlines(),
                files=wheels,
                base="",
                BASE=base,
                PIP_NO_INDEX="1",
            )
            for name, base in bases.items()
        )
    with engine.client() as client:
        for name in set(names(engine)) - before:
            client.remove_image(name, force=True)


def names(engine: Engine) -> list[str]:
    """Names of the images of an engine."""
    with engine.client() as client:
        return [name for one in client.images() for name in one["RepoTags"] or ()]


def made_wheels(folder: Path) -> list[Path]:
    """Build the wheels of this repository."""
    base = getattr(sys, "_base_executable", sys.executable)
    subprocess.run((base, "-m", "venv", str(folder / "venv")), check=True)
    packages = [str(path) for path in (ROOT / "packages").glob("gp-*")]
    pip = (str(folder / "venv/bin/python"), "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder / "wheels"))
    subprocess.run((*pip, *packages), check=True)
    return sorted((folder / "wheels").glob("*.whl"))


@pytest.fixture
def server(engine: Engine, images: tuple[str, str], tmp_path: Path) -> Iterator[Server]:
    """JupyterLab in a container that has the engine's socket."""
    token, log = secrets.token_hex(8), tmp_path / "log"
    own = Path(engine.url.removeprefix("unix://"))
    docker = ("docker", "--host", engine.url)
    mounts = ("-v", f"{own}:/var/run/docker.sock", "--group-add", str(own.stat().st_gid))
    run = (
        *docker,
        "run",
        "--rm",
        "--name",
        "gp",
        "-p",
        "8888:8888",
        *mounts,
        "-e",
        f"JUPYTER_TOKEN={token}",
        images[1],
    )
    with log.open("wb") as file:
        process = subprocess.Popen(run, stdout=file, stderr=file)
    made = Server(8888, token, process, log, engine.address)
    try:
        wait_until(lambda: answers(made), 2 * STARTED, every=0.2)
        discover = ("jupyter-gp", "install", "docker", "--image", images[0], "--discover", "*")
        subprocess.run((*docker, "exec", "gp", *discover), check=True)
        yield made
    finally:
        subprocess.run((*docker, "rm", "-f", "gp"), check=False, capture_output=True)
        process.wait()


def answers(server: Server) -> bool:
    """Whether it is up."""
    assert server.process.poll() is None, server.log
    try:
        return server.ask("GET", "status").status == 200
    except OSError:
        return False


def test_a_server_in_a_container_and_its_kernels_beside_it(server: Server, engine: Engine) -> None:
    specs = server.ask("GET", "kernelspecs").body["kernelspecs"]
    assert [name for name in specs if "kernel-python" not in name] == [], "a kernel in the server's own container"
    with pytest.raises(HTTPError, match="404"):
        urlopen(f"{server.url}/api/terminals?token={server.token}")
    kernel_id = server.start(next(iter(specs)))
    with server.channels(kernel_id) as kernel:
        told = kernel.run(
            "import os, socket; print(os.getuid(), os.environ['HOME'], os.path.exists('/var/run/docker.sock'))"
        )
        assert told.split() == ["1000", "/home/jovyan", "False"]
        server.restart(kernel_id)
        kernel.ready()
        assert kernel.run("6 * 7") == "42"
    with engine.client() as client:
        (found,) = client.containers(filters={"label": f"kernel_id={kernel_id}"})
        assert found["Labels"]["gp.image"].endswith("kernel-python:1")
    server.delete(kernel_id)
    wait_until(lambda: engine.counts()["containers"] == 1, 15)
