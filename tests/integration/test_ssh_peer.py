"""A kernelspec of the peer for kernels on hosts: as it is, by protocol 1, and brought along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from clusters.hosts import SshHosts
from clusters.kernels import Peer
from clusters.kernels.peer import SPEC
from jupyter_client.manager import KernelManager
from support.driven import driven
from support.installation import Installation, wait_until

from gp_core.cli import main
from gp_core.errors import ConfigError, LaunchFailed

pytestmark = [pytest.mark.timeout(120), pytest.mark.relay, pytest.mark.usefixtures("nothing_on_hosts")]

WHERE = "import os, socket; x = 6; print(socket.gethostname(), os.environ['KERNEL_ID'], end='')"


@pytest.fixture
def spec(installation: Installation, peer: Peer, hosts: SshHosts, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The peer's kernelspec, installed; its launcher's `python` is on the hosts' PATH."""
    host = hosts["h1"]
    host.inside("sh", "-c", f'printf "#!/bin/sh\\nexec {peer.python} \\"\\$@\\"\\n" > /usr/bin/python')
    host.inside("chmod", "755", "/usr/bin/python")
    monkeypatch.setenv("GP_SSH_CONFIG", str(hosts.config))
    monkeypatch.setenv("GP_RESPONSE_IP", host.near)
    folder = installation.jupyter.data_dir / "kernels" / SPEC
    shutil.copytree(peer.spec, folder)
    return folder


def by_protocol_1(spec: Path) -> None:
    """Put the one line into the kernelspec that makes it run as it is."""
    path = spec / "kernel.json"
    content = json.loads(path.read_text())
    content["metadata"]["kernel_provisioner"]["config"]["launcher_protocol"] = 1
    path.write_text(json.dumps(content))


def test_by_protocol_1(
    spec: Path, installation: Installation, hosts: SshHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_protocol_1(spec)
    monkeypatch.setenv("GP_ALLOW_PROTOCOL_1", "1")
    with driven(KernelManager(kernel_name=SPEC)) as kernel:
        assert kernel.run(WHERE) == f"h1 {kernel.manager.kernel_id}"
        assert kernel.run("import getpass, os; print(os.getcwd(), end='')") == "/home/gp"
        cell = kernel.start_cell("print('running', flush=True)\nwhile True: pass", "running")
        kernel.manager.interrupt_kernel()
        assert kernel.reply(cell)["ename"] == "KeyboardInterrupt"
        kernel.manager.restart_kernel()
        kernel.client.stop_channels()
        kernel.client = kernel.manager.client()
        kernel.client.start_channels()
        kernel.ready()
        assert "NameError" in kernel.run("x")
        kernel.shutdown()
    installation.check_nothing_left()


def test_its_death_by_protocol_1(
    spec: Path, installation: Installation, hosts: SshHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_protocol_1(spec)
    monkeypatch.setenv("GP_ALLOW_PROTOCOL_1", "1")
    with driven(KernelManager(kernel_name=SPEC)) as kernel:
        hosts["h1"].inside("pkill", "-KILL", "-o", "-f", "launch_ipykernel")  # the listener is its child
        wait_until(lambda: not kernel.alive, 15)
        kernel.shutdown(now=True)
    installation.check_nothing_left()


def test_a_start_that_fails_by_protocol_1(
    spec: Path, installation: Installation, hosts: SshHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_protocol_1(spec)
    monkeypatch.setenv("GP_ALLOW_PROTOCOL_1", "1")
    hosts["h1"].inside("rm", "/usr/bin/python")
    with driven(KernelManager(kernel_name=SPEC), start=False) as kernel:
        with pytest.raises(LaunchFailed, match="No such file or directory: 'python'"):
            kernel.start()
        hosts["h1"].inside("sh", "-c", "printf '#!/bin/sh\\necho no kernel today >&2; exit 3' > /usr/bin/python")
        hosts["h1"].inside("chmod", "755", "/usr/bin/python")
        with pytest.raises(LaunchFailed, match="no kernel today"):
            kernel.start()
    installation.check_nothing_left()


def test_brought_along(spec: Path, installation: Installation, peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    with driven(KernelManager(kernel_name=SPEC), start=False) as kernel, pytest.raises(ConfigError, match="--from"):
        kernel.start()
    assert main(["doctor", SPEC]) == 1
    advice = f"jupyter gp install distributed-provisioner --from {SPEC}"
    assert advice in " ".join(capsys.readouterr().out.split())
    assert main([*advice.split()[2:], "--name", "far", "--python", str(peer.python)]) == 0
    with driven(KernelManager(kernel_name="far")) as kernel:
        assert kernel.run(WHERE) == f"h1 {kernel.manager.kernel_id}"
        kernel.shutdown()
    installation.check_nothing_left()
