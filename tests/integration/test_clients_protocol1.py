"""Kernels whose kernelspec brings the launcher of gateway_provisioners (PyPI), unchanged: protocol 1."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clusters.kernels import Peer
from jupyter_client.manager import AsyncKernelManager, KernelManager
from support.driven import Driven, driven
from support.installation import Installation, wait_until

from gp_core.errors import LaunchDenied, LaunchFailed

pytestmark = [pytest.mark.timeout(120), pytest.mark.relay]  # its channels are always direct

PID = "import os; print(os.getpid())"
ENDLESS = "print('running', flush=True)\nwhile True: pass"
PORTS = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")

Install = Callable[..., str]


@pytest.fixture
def install(installation: Installation, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install the peer's kernelspec with our stanza, and allow protocol 1."""
    monkeypatch.setenv("GP_ALLOW_PROTOCOL_1", "1")
    spec = json.loads((peer.spec / "kernel.json").read_text())
    assert spec["argv"][0] == "python"
    spec["argv"][0] = str(peer.python)
    # a killed launcher leaves its connection file
    scratch = installation.home / "scratch"
    scratch.mkdir()

    def made(env: dict[str, str] | None = None, **config: Any) -> str:
        contents = {**spec, "env": {"TMPDIR": str(scratch), **(env or {})}}
        installation.jupyter.install_spec("peer", contents, config={"launcher_protocol": 1, **config})
        return "peer"

    return made


@pytest.fixture(params=[KernelManager, AsyncKernelManager], ids=["blocking", "async"])
def manager_class(request: pytest.FixtureRequest) -> type[KernelManager]:
    """Both kinds of manager."""
    return request.param  # type: ignore[no-any-return]


def reconnected(kernel: Driven) -> None:
    """Take a new client: such a launcher chooses other ports and another key whenever it starts."""
    kernel.client.stop_channels()
    kernel.client = kernel.manager.client()
    kernel.client.start_channels()
    kernel.ready()


def restarted(kernel: Driven, **kwargs: Any) -> None:
    kernel.do(kernel.manager.restart_kernel(**kwargs))
    reconnected(kernel)


def test_life(installation: Installation, install: Install, manager_class: type[KernelManager]) -> None:
    with driven(manager_class(kernel_name=install())) as kernel:
        manager, info = kernel.manager, kernel.manager.get_connection_info()
        assert kernel.alive
        assert kernel.run("6*7") == "42"
        assert json.loads(Path(manager.connection_file).read_text())["key"].encode() == info["key"]

        cell = kernel.start_cell(ENDLESS, "running")
        kernel.do(manager.interrupt_kernel())
        assert kernel.reply(cell)["ename"] == "KeyboardInterrupt"

        first = kernel.run(PID)
        assert kernel.run("x = 1; x") == "1"
        restarted(kernel)
        second = kernel.run(PID)
        assert second != first
        assert kernel.run("x") == "NameError"
        assert manager.get_connection_info()["key"] != info["key"]
        restarted(kernel, now=True)
        assert kernel.run(PID) not in (first, second)

        kernel.do(manager.shutdown_kernel())
        assert not kernel.alive
        installation.check_nothing_left()


def test_shutdown_now(installation: Installation, install: Install, manager_class: type[KernelManager]) -> None:
    with driven(manager_class(kernel_name=install())) as kernel:
        kernel.do(kernel.manager.shutdown_kernel(now=True))
        assert not kernel.manager.has_kernel
        installation.check_nothing_left()


def test_death_is_seen_and_the_next_kernel_starts(installation: Installation, install: Install) -> None:
    with driven(KernelManager(kernel_name=install())) as kernel:
        os.kill(int(kernel.run(PID)), signal.SIGKILL)
        wait_until(lambda: not kernel.alive, 2)
        restarted(kernel, now=True)
        assert kernel.run("6*7") == "42"
        kernel.shutdown()
        installation.check_nothing_left()


def test_kernel_without_its_listener_is_kept(installation: Installation, install: Install) -> None:
    with driven(KernelManager(kernel_name=install())) as kernel:
        children = "import psutil; print(*[child.pid for child in psutil.Process().children()])"
        os.kill(int(kernel.run(children)), signal.SIGKILL)
        wait_until(lambda: kernel.manager.provisioner._kernel.session is None, 15)
        assert kernel.alive
        cell = kernel.start_cell(ENDLESS, "running")
        kernel.manager.interrupt_kernel()
        assert kernel.reply(cell)["ename"] == "KeyboardInterrupt"
        kernel.shutdown()
        installation.check_nothing_left()


def test_ports_lie_in_the_range(install: Install) -> None:
    with driven(KernelManager(kernel_name=install(port_range="42000..44999"))) as kernel:
        info = kernel.manager.get_connection_info()
        assert all(42000 <= info[name] <= 44999 for name in PORTS)
        assert kernel.run("6*7") == "42"


def test_environment(install: Install) -> None:
    with driven(KernelManager(kernel_name=install({"COLOUR": "${HOME}-red", "PRICE": "$$5"}))) as kernel:
        show = "import os; print(*[os.environ.get(name) for name in ('COLOUR', 'PRICE', 'GP_LAUNCH_SECRETS')], end='')"
        assert kernel.run(show) == f"{os.environ['HOME']}-red $5 None"
        assert kernel.run("print(os.environ['KERNEL_ID'], end='')") == kernel.manager.kernel_id


@pytest.mark.parametrize("policy", ["auto", "required"])
def test_encryption(install: Install, policy: str) -> None:
    with driven(KernelManager(kernel_name=install(), transport_encryption=policy)) as kernel:
        assert kernel.manager.get_connection_info()["curve_publickey"]
        assert kernel.run("6*7") == "42"
        restarted(kernel)
        assert kernel.run("6*7") == "42"


def test_kernel_that_cannot_start_says_why(installation: Installation, install: Install) -> None:
    name = install()
    path = installation.jupyter.data_dir / "kernels" / name / "kernel.json"
    spec = json.loads(path.read_text())
    spec["argv"] = [*spec["argv"][:-1], "no.such.Kernel"]
    spec["metadata"]["kernel_provisioner"]["config"]["launch_timeout"] = 5
    path.write_text(json.dumps(spec))
    with driven(KernelManager(kernel_name=name), start=False) as kernel:
        with pytest.raises(LaunchFailed, match="No module named 'no'"):
            kernel.start()
        installation.check_nothing_left()


def test_not_without_the_operators_word(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    name = install()
    monkeypatch.delenv("GP_ALLOW_PROTOCOL_1")
    with driven(KernelManager(kernel_name=name), start=False) as kernel, pytest.raises(LaunchDenied, match="operator"):
        kernel.start()
