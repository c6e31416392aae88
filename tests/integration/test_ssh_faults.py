"""gp-ssh on hosts to which bad things happen: each start ends in a kernel or in a reason, and nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from clusters.hosts import HOME, Host, SshHosts
from jupyter_client.manager import AsyncKernelManager, KernelManager
from support.driven import Driven, driven
from support.installation import Installation, wait_until

from gp_core.errors import ConfigError, GPError, LaunchFailed
from gp_core.testing import tiny_kernel

pytestmark = [pytest.mark.timeout(300), pytest.mark.relay, pytest.mark.usefixtures("nothing_on_hosts")]

COUNT = "import time\nfor n in range(100):\n    print(n, flush=True)\n    time.sleep(0.1)"


@pytest.fixture
def spec(
    installation: Installation, hosts: SshHosts, ipykernel_spec: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Write the kernelspec `far` for some hosts; the server's address cannot be reached from them."""
    monkeypatch.setenv("GP_RESPONSE_IP", "192.0.2.1")
    monkeypatch.setenv("GP_SSH_CONFIG", str(hosts.config))

    def written(*names: str, tiny: bool = False, **more: Any) -> None:
        content = json.loads((ipykernel_spec / "kernel.json").read_text())
        config = {"remote_hosts": list(names), "callback": "ssh", "launch_timeout": 60, **more}
        content["argv"][0] = sys.executable
        if tiny:  # so that a hundred of them are no matter
            content["argv"] = [sys.executable, "-I", "-S", tiny_kernel.__file__, "{connection_file}", "serve"]
        content["metadata"] = {"kernel_provisioner": {"provisioner_name": "distributed-provisioner", "config": config}}
        folder = installation.jupyter.data_dir / "kernels/far"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "kernel.json").write_text(json.dumps(content))

    return written


@pytest.fixture
def kernel(spec: Callable[..., None]) -> Callable[..., AbstractContextManager[Driven]]:
    """Start an ipykernel on one of some hosts."""

    def started(*names: str, start: bool = True, **more: Any) -> AbstractContextManager[Driven]:
        spec(*names, **more)
        return driven(KernelManager(kernel_name="far"), start=start)

    return started


# -- the way there


def cut(host: Host, seconds: float) -> None:
    host.partition(True)
    time.sleep(seconds)
    host.partition(False)


def kill_sessions(host: Host, seconds: float) -> None:
    host.kill_sessions()


def restart_sshd(host: Host, seconds: float) -> None:
    host.stop_sshd()
    host.kill_sessions()
    time.sleep(seconds)
    host.start_sshd()


def freeze(host: Host, seconds: float) -> None:
    host.freeze(True)
    time.sleep(seconds)
    host.freeze(False)


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [(cut, 5), (cut, 90), (kill_sessions, 0), (restart_sshd, 4), (freeze, 20)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_no_line_is_lost(
    kernel: Callable[..., Any], hosts: SshHosts, fault: Callable[[Host, float], None], seconds: float
) -> None:
    with kernel("h1") as used:
        cell = used.start_cell(COUNT, "0")
        fault(hosts["h1"], seconds)
        assert used.output(cell, 90).split() == [str(n) for n in range(1, 100)]
        assert used.alive


def test_a_partition_of_kernels_that_dial(
    kernel: Callable[..., Any], hosts: SshHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = hosts["h1"]
    with kernel("h1", start=False, callback="dial") as used:
        monkeypatch.setenv("GP_RESPONSE_IP", host.near)
        used.start()
        cell = used.start_cell(COUNT, "0")
        cut(host, 5)
        assert used.output(cell, 90).split() == [str(n) for n in range(1, 100)]


# -- ends


def test_a_host_that_is_rebooted_has_lost_its_kernel(kernel: Callable[..., Any], hosts: SshHosts) -> None:
    with kernel("h1") as used:
        hosts["h1"].reboot()
        wait_until(lambda: not used.alive, 90, every=0.5)
        used.restart()
        assert "42" in used.run("6 * 7")


@pytest.mark.parametrize("number", ["KILL", "SEGV"])
def test_a_kernel_that_is_killed_dies_visibly(kernel: Callable[..., Any], hosts: SshHosts, number: str) -> None:
    with kernel("h1") as used:
        pid = used.run("import os; print(os.getpid())").strip()
        hosts["h1"].inside("kill", f"-{number}", pid)
        wait_until(lambda: not used.alive, 15)


def test_a_kernel_whose_launcher_is_killed_ends_too(kernel: Callable[..., Any], hosts: SshHosts) -> None:
    with kernel("h1") as used:
        launcher = used.run("import os; print(os.getppid())").strip()
        hosts["h1"].inside("kill", "-KILL", launcher)
        wait_until(lambda: not used.alive, 30)
        wait_until(lambda: not hosts["h1"].processes(), 15)


# -- hosts on which nothing can be started


def test_a_password(
    kernel: Callable[..., Any], hosts: SshHosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts["h3"].inside("sh", "-c", "echo 'root:open sesame' | chpasswd")
    without_key, password = tmp_path / "ssh_config", tmp_path / "password"
    without_key.write_text(hosts.config.read_text().replace(f"{hosts.folder}/id", "/nowhere/id"))
    password.touch(0o600)
    with kernel("h3", start=False) as used:
        monkeypatch.setenv("GP_SSH_CONFIG", str(without_key))
        with pytest.raises(LaunchFailed, match="AuthenticationFailed"):
            used.start()
        monkeypatch.setenv("GP_SSH_PASSWORD_FILE", str(password))
        password.write_text("open says me")
        with pytest.raises(LaunchFailed, match="AuthenticationFailed"):
            used.start()
        password.write_text("open sesame\n")
        used.start()
        assert used.run("import socket; print(socket.gethostname(), end='')") == "h3"


@pytest.mark.parametrize("options", ["size=64k", "ro"], ids=["full", "read-only"])
def test_a_home_that_takes_nothing(kernel: Callable[..., Any], hosts: SshHosts, options: str) -> None:
    host = hosts["h3"]
    host.inside(
        "sh",
        "-c",
        f"cp -r {HOME}/.ssh /run/keys; mount -t tmpfs -o mode=700,{options.replace('ro', 'size=1m')} none {HOME}",
    )
    host.inside("sh", "-c", f"cp -r /run/keys {HOME}/.ssh")
    if options == "ro":
        host.inside("mount", "-o", "remount,ro", HOME)
    else:
        host.inside("sh", "-c", f"head -c 1000000 /dev/zero > {HOME}/large || true")
    try:
        with pytest.raises(LaunchFailed) as caught, kernel("h3", start=False) as used:
            used.start()
        for part in ("h3", "HostFailed", {"ro": "Read-only", "size=64k": "No space"}[options]):
            assert part in str(caught.value)
    finally:
        host.inside("umount", HOME)
    with kernel("h3") as used:
        assert "42" in used.run("6 * 7")


def test_a_login_that_is_slow_and_talks(kernel: Callable[..., Any], hosts: SshHosts) -> None:
    text = "echo 'Welcome {}'; echo oops >&2; sleep 2"
    hosts["h1"].inside("sh", "-c", f'echo "{text}" > {HOME}/.bashrc')
    try:
        with kernel("h1") as used:
            assert "42" in used.run("6 * 7")
    finally:
        hosts["h1"].inside("rm", f"{HOME}/.bashrc")


# -- many at once


async def starts(count: int, meanwhile: Callable[[], object] = lambda: None) -> Counter[str]:
    """Start kernels at the same time, end those that came; returns what became of the starts."""
    managers = [AsyncKernelManager(kernel_name="far") for _ in range(count)]

    async def start(manager: AsyncKernelManager) -> str:
        try:
            await manager.start_kernel()
        except GPError as error:
            failure = getattr(error, "failure", None)
            return failure.code if failure else type(error).__name__
        return "kernel"

    started = asyncio.gather(*map(start, managers))
    await asyncio.sleep(0.3)
    await asyncio.to_thread(meanwhile)
    became = Counter(await started)
    await asyncio.gather(*(one.shutdown_kernel(now=True) for one in managers if one.has_kernel), return_exceptions=True)
    return became


def test_a_host_that_bears_few_connections(spec: Callable[..., None], hosts: SshHosts) -> None:
    hosts["h2"].kill_sessions()
    spec("h2")
    assert asyncio.run(starts(12)) == {"kernel": 12}


def test_a_host_dies_while_a_hundred_kernels_start(spec: Callable[..., None], hosts: SshHosts) -> None:
    spec("h1", "h2", "h3", tiny=True)
    try:
        became = asyncio.run(starts(100, hosts["h3"].power_off))
    finally:
        hosts["h3"].down()
        hosts["h3"].up()
    assert became["kernel"] >= 66
    assert sum(became.values()) == 100
    assert set(became) <= {"kernel", "LaunchTimeout", "KernelGone", "LauncherEnded", "HostUnreachable", "NoHost"}, (
        became
    )


# -- hostile values; what they say of a canary is said of a file that nobody else on this disk has

CANARY = f"canary-{secrets.token_hex(8)}"
HOSTILE = [
    "'",
    '"',
    "$(touch canary)",
    "`touch canary`",
    "a\nb",
    "; touch canary",
    "-oProxyCommand=touch canary",
    "ü ☃",
]


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values_are_data(kernel: Callable[..., Any], hosts: SshHosts, value: str) -> None:
    value = value.replace("canary", CANARY)
    env = {"KERNEL_USERNAME": value, "KERNEL_WORKING_DIR": f"/{value}", "KERNEL_X": value, "PATH": "/usr/bin:/bin"}
    with kernel("h1", start=False) as used:
        try:
            used.start(env=env)
        except (GPError, ValueError):
            pass  # refused
        else:
            assert used.run("import os; print(ascii(os.environ['KERNEL_X']))").strip() == ascii(value)
    assert hosts["h1"].inside("find", "/", "-xdev", "-name", f"{CANARY}*") == ""


@pytest.mark.parametrize("value", [*HOSTILE, "h1 -oProxyCommand=touch", "-F/etc/passwd", "a@-o@h1"])
def test_hosts_that_are_none_are_refused(kernel: Callable[..., Any], value: str) -> None:
    with pytest.raises(ConfigError, match="remote_hosts"), kernel(value, start=False) as used:
        used.start()


def test_kernel_ids_that_are_paths_are_refused(kernel: Callable[..., Any], hosts: SshHosts) -> None:
    for kernel_id in ("../../canary", "a/b", "$(touch canary)"):
        with contextlib.suppress(GPError, ValueError), kernel("h1", start=False) as used:
            used.start(kernel_id=kernel_id.replace("canary", CANARY))
    assert hosts["h1"].inside("find", "/", "-xdev", "-name", f"{CANARY}*") == ""
