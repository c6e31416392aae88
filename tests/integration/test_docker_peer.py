"""A kernelspec of the peer for kernels in containers: as it is, by protocol 1, and brought along."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from clusters.docker import Engine, hides_ports
from clusters.kernels import Peer
from jupyter_client.manager import KernelManager
from support.boxed import Boxed, inspected
from support.driven import driven
from support.installation import Installation, wait_until

from gp_core.cli import main
from gp_core.errors import ConfigError, GPError

pytestmark = [pytest.mark.timeout(120), pytest.mark.relay]

SPEC = "peer_docker"


@pytest.fixture
def spec(
    installation: Installation,
    peer: Peer,
    engine: Engine,
    boxed: Boxed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The peer's kernelspec for an image that has its launcher, installed."""
    image = engine.peer_image(peer.packages)
    folder = installation.jupyter.data_dir / "kernels" / SPEC
    shutil.copytree(peer.docker_spec(image, tmp_path), folder)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")  # its script needs the docker library
    return folder


def by_protocol_1(spec: Path, **config: object) -> None:
    path = spec / "kernel.json"
    content = json.loads(path.read_text())
    content["metadata"]["kernel_provisioner"]["config"] |= {"launcher_protocol": 1, **config}
    path.write_text(json.dumps(content))


@pytest.mark.xfail(hides_ports(), reason="protocol 1 is direct, and the engine hides its kernels' ports", strict=True)
def test_by_protocol_1(spec: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    by_protocol_1(spec)
    monkeypatch.setenv("GP_ALLOW_PROTOCOL_1", "1")
    monkeypatch.setenv("KERNEL_UID", "0")  # what users send does not count
    with driven(KernelManager(kernel_name=SPEC)) as used:
        assert used.run("import os; x = 6; print(os.getuid(), os.getgid(), end='')") == "1000 100"
        assert inspected(engine, used)["Config"]["Labels"]["app"] == "gateway-provisioners"
        cell = used.start_cell("print('running', flush=True)\nwhile True: pass", "running")
        used.do(used.manager.interrupt_kernel())
        assert used.reply(cell)["ename"] == "KeyboardInterrupt"
        assert "42" in used.run("x * 7")
        with engine.client() as client:
            client.kill(inspected(engine, used)["Id"])
        wait_until(lambda: not used.alive, 15)


def test_what_is_prohibited_is_so_for_scripts(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GP_ALLOW_PROTOCOL_1", "1")
    by_protocol_1(spec, uid="0")
    with driven(KernelManager(kernel_name=SPEC), start=False) as used, pytest.raises(GPError, match="prohibited_uids"):
        used.do(used.manager.start_kernel())


def test_why_it_does_not_start(spec: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GP_ALLOW_PROTOCOL_1", "1")
    image = engine.image("wrong", 'CMD ["/bin/bash", "-c", "echo no such language; exit 1"]')
    by_protocol_1(spec, image_name=image)
    with driven(KernelManager(kernel_name=SPEC), start=False) as used, pytest.raises(GPError, match="no such language"):
        used.do(used.manager.start_kernel())


def test_as_it_is_and_brought_along(spec: Path) -> None:
    advice = "jupyter gp install --from"
    with driven(KernelManager(kernel_name=SPEC), start=False) as used, pytest.raises(ConfigError, match=advice):
        used.do(used.manager.start_kernel())
    assert main(["install", "docker", "--from", SPEC, "--name", "brought"]) == 0
    with driven(KernelManager(kernel_name="brought")) as used:
        assert used.run("print(6 * 7, end='')") == "42"
