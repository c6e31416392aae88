"""gp-docker with engines elsewhere: through TLS, docker contexts, and ssh; several of them in one server."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters.availability import offer
from clusters.docker import Engine, offered
from clusters.sshd import Sshd
from jupyter_client.manager import KernelManager
from support.boxed import KERNEL, Boxed, boxing
from support.driven import Driven
from support.installation import Installation

from gp_core.cli import main
from gp_core.errors import GPError

pytestmark = [pytest.mark.timeout(300), pytest.mark.relay]


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Engine]:
    """An engine that listens to who has a certificate."""
    with offered("d2", tls=True) as made:
        yield made


@pytest.fixture
def far(
    installation: Installation, elsewhere: Engine, ipykernel_spec: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Boxed]:
    """Start an ipykernel in a container there; how to get there is the test's business."""
    for name in ("DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH"):
        monkeypatch.delenv(name, raising=False)
    with boxing(installation, ipykernel_spec, elsewhere) as started:
        yield started


def used_well(used: Driven) -> None:
    """Run a cell, interrupt one, restart."""
    used.run("x = 1")
    cell = used.start_cell("print('running', flush=True)\nwhile True: pass", "running")
    used.do(used.manager.interrupt_kernel())
    assert used.reply(cell)["ename"] == "KeyboardInterrupt"
    used.restart()
    assert "NameError" in used.run("x")


def test_tls(far: Boxed, elsewhere: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", elsewhere.tcp)
    with far(start=False) as used, pytest.raises(GPError, match=elsewhere.tcp) as caught:
        used.do(used.manager.start_kernel())
    assert "[EngineUnreachable]" in str(caught.value)
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CERT_PATH", str(elsewhere.certificates))
    with far() as used:
        used_well(used)


def test_a_docker_context(
    far: Boxed, elsewhere: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    at = {"host": elsewhere.tcp, **{name: f"{elsewhere.certificates}/{name}.pem" for name in ("ca", "cert", "key")}}
    described = ",".join(f"{name}={value}" for name, value in at.items())
    subprocess.run(("docker", "context", "create", "elsewhere", "--docker", described), check=True)
    with far(engine="elsewhere") as used:
        used_well(used)
        assert main(["ps"]) == 0
        assert used.manager.kernel_id[:8] in capsys.readouterr().out
    with far(start=False, engine="nowhere") as used, pytest.raises(GPError, match="no docker context 'nowhere'"):
        used.do(used.manager.start_kernel())
    subprocess.run(("docker", "context", "use", "elsewhere"), check=True)
    with far() as used:
        assert "42" in used.run("6 * 7")


def test_ssh(far: Boxed, elsewhere: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sshd = Sshd(elsewhere, options=f"SetEnv DOCKER_HOST={elsewhere.url}")
    try:
        offer("ssh", sshd.up)
        wrapped = tmp_path / "ssh"
        wrapped.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {sshd.config} "$@"\n')
        wrapped.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setenv("DOCKER_HOST", "ssh://root@h1")
        with far() as used:
            used_well(used)
            sshd.kill_sessions()  # the next question opens another
            assert used.alive
            used.restart()
    finally:
        sshd.down()


def test_an_engine_that_hangs_delays_no_other(
    far: Boxed,
    elsewhere: Engine,
    engine: Engine,
    installation: Installation,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DOCKER_HOST", engine.url)
    before = engine.counts()
    with far(engine=elsewhere.url) as used:
        other = Driven(KernelManager(kernel_name=KERNEL))
        spec = installation.jupyter.data_dir / "kernels" / KERNEL / "kernel.json"
        told = json.loads(spec.read_text())
        told["metadata"]["kernel_provisioner"]["config"].pop("engine")
        spec.write_text(json.dumps(told))
        with elsewhere.hanging():
            began = time.monotonic()
            other.start()
            assert "42" in other.run("6 * 7")
            other.shutdown()
            assert time.monotonic() - began < 15
            assert "42" in used.run("6 * 7")
            began = time.monotonic()
            assert main(["ps"]) == 0
            assert time.monotonic() - began < 13  # its own limit for what does not answer, and Python
            assert used.manager.kernel_id[:8] in capsys.readouterr().out
    assert engine.counts() == before
