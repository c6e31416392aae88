"""Fixtures of the integration tests: what a machine can offer, and a Jupyter that nobody else uses.

Environment of a test run:

- `GP_TEST_REQUIRE`: names, separated by commas, whose absence is a failure and not a skip; `all` for all.
  They are the names given to `require` and `offer`: slurm, ssh, sudo, docker, swarm, wan, irkernel, jjava,
  xeus-python, gateway-provisioners, chromium.
- `GP_TEST_DOCKERD`: path of another Docker engine than the system's, such as a newer one; its runc and docker-proxy
  lie beside it.
- `GP_TEST_SLURM_CONF`: the slurm.conf of a cluster to use instead of one of our own.
- `GP_TEST_PAUSE`: seconds for which a client of a relayed kernel reads nothing (default: 15).
- `GP_TEST_SEED`: when a relayed kernel's line breaks, as a failed test has printed it.
- `GP_TEST_CACHE`: where downloads are kept (default: `gp-tests` in the XDG cache folder).
- `GP_TEST_ARTIFACTS`: where screenshots are kept (default: `gp-tests-USER` in the folder for temporary files).
"""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from clusters import kernels
from clusters.availability import Unavailable, offer, require
from clusters.docker import Engine, offered
from clusters.hosts import SshHosts
from clusters.jupyter_env import JupyterEnv, isolated_jupyter
from clusters.slurm import SlurmCluster
from clusters.wan import Link
from support.boxed import Boxed, boxing
from support.installation import Installation, installed, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser

__all__ = ["JupyterEnv", "offer", "require"]

ARTIFACTS = pytest.StashKey[Path]()


# -- clusters


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """A Docker engine with an image that has ipykernel; its containers outlive it."""
    with offered("d1", "--live-restore") as made:
        yield made


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A running Slurm, to which Slurm's commands talk for the rest of the session (`SLURM_CONF`)."""
    given = os.environ.get("GP_TEST_SLURM_CONF")
    cluster = SlurmCluster(existing_config=Path(given) if given else None)
    offer("slurm", cluster.up)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in cluster.env.items():
                patch.setenv(name, value)
            yield cluster
    finally:
        cluster.down()


@pytest.fixture
def link() -> Iterator[Link]:
    """A far network behind a line that this test may shape and break."""
    line = Link()
    offer("wan", line.up)
    try:
        yield line
    finally:
        line.down()


@pytest.fixture(scope="module")
def hosts() -> Iterator[SshHosts]:
    """Three hosts; the second bears few connections and questions at a time, the third takes passwords."""
    made = SshHosts("", "MaxSessions 2\nMaxStartups 3", "PasswordAuthentication yes\nPermitRootLogin yes")
    try:
        offer("ssh", made.up)
        yield made
    finally:
        made.down()


@pytest.fixture
def nothing_on_hosts(hosts: SshHosts) -> Iterator[None]:
    """No process of ours runs on any host in the end."""
    yield
    for host in hosts.hosts.values():
        with suppress(TimeoutError):
            wait_until(lambda host=host: not host.processes(), 25)
        assert host.processes() == []


# -- kernels


@pytest.fixture(scope="session")
def ipykernel_spec() -> Path:
    """Kernelspec folder of ipykernel in the interpreter that runs the tests."""
    return kernels.ipykernel()


@pytest.fixture(scope="session")
def irkernel_spec() -> Path:
    """Kernelspec folder of the R kernel: interrupted by signal."""
    return offer("irkernel", kernels.irkernel)


@pytest.fixture(scope="session")
def jjava_spec() -> Path:
    """Kernelspec folder of a Java kernel: interrupted by message."""
    return offer("jjava", kernels.jjava)


@pytest.fixture(scope="session")
def xeus_python_spec() -> Path:
    """Kernelspec folder of a kernel that dies on SIGINT."""
    return offer("xeus-python", kernels.xeus_python)


@pytest.fixture(scope="session")
def peer() -> kernels.Peer:
    """gateway_provisioners, with a kernelspec that its own tool has made."""
    return offer("gateway-provisioners", kernels.peer)


# -- Jupyter


@pytest.fixture
def jupyter_env() -> Iterator[JupyterEnv]:
    """A Jupyter of this test's own: no kernelspec, setting, running kernel or key of the tester is in sight.

    Kernelspecs of the interpreter's own environment (`share/jupyter/kernels`) stay visible.
    """
    with isolated_jupyter() as env:
        yield env


# -- gp


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the tester choose how clients reach kernels."""
    choices = ["relay", "direct", "both"]
    parser.addoption("--channels", choices=choices, default="relay", help="how clients reach kernels in the tests")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests that start kernels in each of the chosen modes, but those that are about one of them."""
    chosen = metafunc.config.getoption("channels")
    is_of_one = metafunc.definition.get_closest_marker("relay")
    if "channels" in metafunc.fixturenames and chosen != "relay" and not is_of_one:
        metafunc.parametrize("channels", ["relay", "direct"] if chosen == "both" else [chosen])


@pytest.fixture
def channels() -> str:
    """How clients reach kernels."""
    return "relay"


@pytest.fixture
def installation(channels: str) -> Iterator[Installation]:
    """A gp and a Jupyter of this test's own, which must leave nothing: no process, no record, no endpoint."""
    with installed(channels) as made:
        yield made


@pytest.fixture
def boxed(
    installation: Installation, engine: Engine, ipykernel_spec: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Boxed]:
    """Start an ipykernel in a container of the engine."""
    monkeypatch.setenv("DOCKER_HOST", engine.url)
    with boxing(installation, ipykernel_spec, engine) as started:
        yield started


# -- browsers


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium without a window."""
    with ExitStack() as stack:

        def start() -> Browser:
            try:
                from support.labpage import chromium
            except ModuleNotFoundError as missing:
                raise Unavailable(f"needs: pip install {missing.name}") from None
            return stack.enter_context(chromium())

        yield offer("chromium", start)


@pytest.fixture(scope="session")
def artifacts(pytestconfig: pytest.Config) -> Path:
    """Folder for what people shall look at after the tests."""
    given = os.environ.get("GP_TEST_ARTIFACTS")
    folder = Path(given) if given else Path(tempfile.gettempdir()) / f"gp-tests-{getpass.getuser()}"
    folder.mkdir(parents=True, exist_ok=True)
    pytestconfig.stash[ARTIFACTS] = folder
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say where the artefacts are."""
    if (folder := config.stash.get(ARTIFACTS, None)) is not None:
        terminalreporter.write_line(f"to look at: {folder}")
