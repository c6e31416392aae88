"""kill -9, SIGSTOP and cut lines at every stage, with real servers, launchers and kernels."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import AsyncKernelManager
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from support.answering import Answering, HostApplication
from support.driven import client_of
from support.installation import Installation, wait_until

from gp_core import testing
from gp_core.errors import CALLBACK_UNREACHABLE, KERNEL_DIED, LAUNCHER_DIED, NO_SPACE, LaunchFailed
from gp_core.kernel import RemoteKernel
from gp_core.local import LocalBackend
from gp_core.server import KernelServer

TINY = Path(testing.__file__).with_name("tiny_kernel.py")
GP = str(Path(sys.executable).with_name("jupyter-gp"))
ORPHAN = 2.0
TINY_SPEC = {"argv": ["python3", str(TINY), "{connection_file}", "serve"]}


class Victim(Answering):
    """A server process with one kernel."""

    def __init__(self, installation: Installation, spec: str, **env: str) -> None:
        super().__init__(installation, "victim.py", spec, **env)


@pytest.fixture
def victim(installation: Installation) -> Iterator[Callable[..., Victim]]:
    """Start a server with one tiny kernel whose orphan timeout is short."""
    installation.jupyter.install_spec("tiny", TINY_SPEC, config={"orphan_timeout": ORPHAN})
    installation.jupyter.install_spec("unhurried", TINY_SPEC, config={"orphan_timeout": 3 * ORPHAN})
    started: list[Victim] = []

    def start(spec: str = "tiny", **env: str) -> Victim:
        made = Victim(installation, spec, **env)
        started.append(made)
        return made

    yield start
    for one in started:
        one.end()


def collect(installation: Installation, *options: str) -> None:
    """Run ``jupyter gp gc``, as an operator would."""
    subprocess.run([GP, "gc", *options], check=True, timeout=60, capture_output=True)


def ps() -> dict[str, dict[str, Any]]:
    """What ``jupyter gp ps`` says, by kernel id."""
    done = subprocess.run([GP, "ps", "--json"], check=True, timeout=60, capture_output=True, text=True)
    return {row["kernel_id"]: row for row in json.loads(done.stdout)["kernels"]}


# The server


STAGES = [
    "before record",
    "before plugins",
    "before launch",
    "after launch",
    "before confirm",
    "before connected",
    "after confirm",
]


@pytest.mark.parametrize("stage", STAGES)
def test_a_server_killed_while_it_starts_a_kernel_leaves_nothing_for_long(
    installation: Installation, victim: Callable[..., Victim], stage: str
) -> None:
    dying = victim(DIE_AT=stage)
    assert dying.hear() == {"died": stage}
    dying.process.wait(10)
    wait_until(lambda: not installation.processes(), ORPHAN + 10)
    collect(installation)
    assert installation.records() == []


def test_a_killed_servers_kernel_ends_by_its_lease(installation: Installation, victim: Callable[..., Victim]) -> None:
    one = victim()
    heard = one.hear()
    one.end()
    assert psutil.pid_exists(heard["launcher"])
    assert not ps()[heard["kernel_id"]]["owner"]["alive"]
    wait_until(lambda: not installation.processes(), ORPHAN + 10)
    collect(installation)
    assert installation.records() == []


def test_a_stopped_server_finds_its_kernel_again(installation: Installation, victim: Callable[..., Victim]) -> None:
    one = victim()
    launcher = one.hear()["launcher"]
    one.process.send_signal(signal.SIGSTOP)
    time.sleep(ORPHAN / 2)
    one.process.send_signal(signal.SIGCONT)
    wait_until(lambda: one.ask("connected")["connected"], 20)
    assert one.ask("alive") == {"alive": True}
    assert psutil.pid_exists(launcher)
    assert one.ask("shutdown") == {"done": True}


def test_a_server_stopped_for_too_long_finds_its_kernel_dead(
    installation: Installation, victim: Callable[..., Victim]
) -> None:
    one = victim()
    launcher = psutil.Process(one.hear()["launcher"])
    one.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: not launcher.is_running() or launcher.status() == psutil.STATUS_ZOMBIE, ORPHAN + 20)
    one.process.send_signal(signal.SIGCONT)
    wait_until(lambda: one.ask("alive") == {"alive": False}, 10)
    assert one.ask("shutdown") == {"done": True}


def test_a_restarted_server_with_the_same_key_and_port_is_called_again(
    installation: Installation, victim: Callable[..., Victim]
) -> None:
    orphan = 3 * ORPHAN  # a slow machine starts the second server in it
    one = victim("unhurried")
    heard = one.hear()
    one.end()
    two = victim(GP_RESPONSE_PORT=str(heard["port"]), GP_RESPONSE_PORT_RETRIES="0")
    assert two.hear()["port"] == heard["port"]
    wait_until(lambda: heard["kernel_id"] in two.ask("connected")["kernels"], 20)
    time.sleep(orphan + 1)
    assert psutil.pid_exists(heard["launcher"]), "its lease ended though a server had accepted it"
    row = ps()[heard["kernel_id"]]
    assert row["owner"]["alive"]
    assert two.ask("shutdown") == {"done": True}
    two.end()
    wait_until(lambda: not installation.processes(), orphan + 10)
    collect(installation)


# A server takes the kernel of a killed one over


ID = "8a0e1f7c-0000-4000-8000-00000000000a"
MANAGERS = ["MappingKernelManager", "AsyncMappingKernelManager"]


@pytest.fixture
def host(installation: Installation, ipykernel_spec: Path) -> Iterator[Callable[..., HostApplication]]:
    """Start a host application; its kernels are ipykernels."""
    installation.jupyter.install_spec("py", ipykernel_spec, config={"launch_timeout": 45})
    started: list[HostApplication] = []

    def start(manager: str = MANAGERS[0], **env: str) -> HostApplication:
        started.append(HostApplication(installation, manager, **env))
        return started[-1]

    yield start
    for one in started:
        one.end()
    subprocess.run([GP, "gc", "--all"], check=True, timeout=60, capture_output=True)


def value_of(client: BlockingKernelClient, expression: str) -> str:
    """What an expression is in the kernel, or the name of its error."""
    content = client.execute("", user_expressions={"it": expression}, reply=True, timeout=30)["content"]
    told = content["user_expressions"]["it"]
    return str(told["data"]["text/plain"] if told["status"] == "ok" else told["ename"])


@pytest.mark.parametrize(("former", "heir"), [MANAGERS, MANAGERS[::-1]], ids=["to-async", "from-async"])
def test_a_killed_servers_kernel_is_taken_over_with_its_variables(
    installation: Installation,
    host: Callable[..., HostApplication],
    former: str,
    heir: str,
    channels: str,
) -> None:
    one = host(former)
    connection = one.ask(f"start {ID} py")["connection"]
    with client_of(connection) as client:  # stays open all the while: its endpoints do not change
        client.execute("x = 41", reply=True, timeout=30)
        pid = value_of(client, "__import__('os').getpid()")
        one.end()
        if channels == "direct":
            assert value_of(client, "x") == "41", "the kernel does not need its server"
        row = ps()[ID]
        assert row["owner"] == {"host": row["owner"]["host"], "pid": one.process.pid, "alive": False}
        assert row["lease_left"] == {"seconds": 24 * 3600.0, "at_most": True}
        two = host(heir)
        assert two.ask(f"start {ID} py") == {"connection": connection}
        assert (value_of(client, "x + 1"), value_of(client, "__import__('os').getpid()")) == ("42", pid)
        row = ps()[ID]
        assert (row["owner"]["pid"], row["owner"]["alive"], row["lease_left"]) == (two.process.pid, True, None)
        refused = host().ask(f"start {ID} py")
        assert "[OwnedByAnotherServer]" in refused["text"]
        assert f"pid {two.process.pid} at" in refused["text"]
        assert value_of(client, "x") == "41"
        assert two.ask(f"shutdown {ID}") == {"done": True}
    installation.check_nothing_left()


async def test_after_a_takeover_interrupt_restart_and_autorestart_work(
    installation: Installation, host: Callable[..., HostApplication]
) -> None:
    one = host()
    connection = one.ask(f"start {ID} py")["connection"]
    with client_of(connection) as client:
        client.execute("x = 41", reply=True, timeout=30)
    one.end()
    manager = AsyncMappingKernelManager()
    await manager.start_kernel(kernel_id=ID, kernel_name="py")
    km = manager.get_kernel(ID)
    client = km.client()
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=60)

        async def get(expression: str) -> str:
            reply = await client._async_execute_interactive("", user_expressions={"it": expression}, timeout=30)
            told = reply["content"]["user_expressions"]["it"]
            return str(told["data"]["text/plain"] if told["status"] == "ok" else told["ename"])

        assert await get("x") == "41"
        endless = client.execute("import time\nwhile True: time.sleep(0.01)", reply=True, timeout=30)
        endless = asyncio.ensure_future(endless)
        await asyncio.sleep(1)
        await manager.interrupt_kernel(ID)
        assert (await endless)["content"]["ename"] == "KeyboardInterrupt"
        assert await get("x") == "41"
        await manager.restart_kernel(ID)
        await client.wait_for_ready(timeout=60)
        assert await get("x") == "NameError"
        pid = int(await get("__import__('os').getpid()"))
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while km.provisioner._kernel.record.run < 3 or not await km.is_alive():
            assert time.monotonic() < deadline, "it was not restarted"
            await asyncio.sleep(0.1)
        await client.wait_for_ready(timeout=60)
        assert int(await get("__import__('os').getpid()")) != pid
    finally:
        client.stop_channels()
        await manager.shutdown_kernel(ID, now=True)


def test_the_wrong_user_and_a_recorded_port_that_is_taken_are_told(
    installation: Installation, host: Callable[..., HostApplication]
) -> None:
    env = {"GP_USER_SOURCE": "client"}
    one = host(**env)
    connection = one.ask(f"start {ID} py ada")["connection"]
    with client_of(connection) as client:
        client.execute("x = 41", reply=True, timeout=30)
        one.end()
        two = host(**env)
        refused = two.ask(f"start {ID} py eve")
        assert refused["error"] == "LaunchDenied"
        assert "belongs to user 'ada': user 'eve' may not take it over" in refused["text"]
        bind = json.loads((installation.data_dir / "kernels" / f"{ID}.json").read_text())["bind"]
        port = int(bind.rpartition(":")[2])
        with socket.create_server(("127.0.0.1", port)):
            refused = two.ask(f"start {ID} py ada")
            assert "[CallbackPortTaken]" in refused["text"]
            assert f"pid {os.getpid()}" in refused["text"]
        assert two.ask(f"start {ID} py ada") == {"connection": connection}
        assert value_of(client, "x") == "41"
        assert two.ask(f"shutdown {ID}") == {"done": True}


# Kernel and launcher, at every stage of a start


@pytest.fixture
async def tiny(installation: Installation) -> AsyncKernelManager:
    """A manager of a tiny kernel."""
    installation.jupyter.install_spec("tiny", TINY_SPEC, config={"launch_timeout": 20})
    return AsyncKernelManager(kernel_name="tiny")


async def test_a_launcher_killed_before_it_calls(tiny: AsyncKernelManager, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = LocalBackend.launch

    async def shot(self: LocalBackend, request: Any) -> Any:
        handle = await launch(self, request)
        os.kill(handle["pid"], signal.SIGKILL)
        return handle

    monkeypatch.setattr(LocalBackend, "launch", shot)
    began = time.monotonic()
    with pytest.raises(LaunchFailed) as caught:
        await tiny.start_kernel()
    assert time.monotonic() - began < 3
    assert caught.value.failure is LAUNCHER_DIED


@pytest.mark.parametrize(("whom", "reason"), [("launcher", LAUNCHER_DIED), ("kernel", KERNEL_DIED)])
async def test_killed_between_call_and_listening(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, whom: str, reason: object
) -> None:
    spec = {"argv": ["python3", str(TINY), "{connection_file}", "never"]}
    installation.jupyter.install_spec("mute", spec)
    connected = RemoteKernel.connected

    def shot(self: RemoteKernel, session: Any, hello: Any) -> Any:
        answer = connected(self, session, hello)
        launcher = psutil.Process(hello.pid)
        (launcher if whom == "launcher" else launcher.children()[0]).kill()
        return answer

    monkeypatch.setattr(RemoteKernel, "connected", shot)
    with pytest.raises(LaunchFailed) as caught:
        await AsyncKernelManager(kernel_name="mute").start_kernel()
    assert caught.value.failure is reason
    if whom == "launcher":
        monkeypatch.undo()
        await swept_by_the_next(installation)


async def swept_by_the_next(installation: Installation) -> None:
    """Start another launcher: it deletes what one that was killed left behind, once that cannot be a newcomer's."""
    (left,) = (installation.home / "launchers").iterdir()
    os.utime(left, (0, 0))
    installation.jupyter.install_spec("tiny", {"argv": ["python3", str(TINY), "{connection_file}", "serve"]})
    km = AsyncKernelManager(kernel_name="tiny")
    await km.start_kernel()
    await km.shutdown_kernel(now=True)
    assert not left.exists()


async def test_a_callback_that_nobody_can_reach_is_named(
    tiny: AsyncKernelManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KernelServer, "addresses", lambda self, *, local: ["192.0.2.1:9"])
    monkeypatch.setattr("gp_core.provisioner.RemoteProvisioner.launch_timeout", 1.5)
    tiny.kernel_spec.metadata["kernel_provisioner"]["config"]["launch_timeout"] = 1.5
    with pytest.raises(LaunchFailed) as caught:
        await tiny.start_kernel()
    assert caught.value.failure is CALLBACK_UNREACHABLE
    assert "jupyter gp doctor" in str(caught.value)


# The line


class Line:
    """A wire between launchers and server that can be cut; what is on it then is lost, as with a pulled cable."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.whole = True
        self._moving: set[asyncio.Task[None]] = set()

    async def open(self) -> int:
        self._server = await asyncio.start_server(self._joined, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _joined(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", self.port)
        for source, target in ((reader, there[1]), (there[0], writer)):
            task = asyncio.create_task(self._move(source, target))
            self._moving.add(task)
            task.add_done_callback(self._moving.discard)

    async def _move(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                while not self.whole:
                    await asyncio.sleep(0.05)
                writer.write(data)
        except OSError:
            pass
        finally:
            writer.close()

    async def close(self) -> None:
        self._server.close()
        for task in list(self._moving):
            task.cancel()
        await asyncio.gather(*self._moving, return_exceptions=True)
        await asyncio.sleep(0.05)


async def test_a_cut_line_loses_no_kernel_and_starts_no_second_one(
    installation: Installation, tiny: AsyncKernelManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partition of many times the silence after which both ends take the session for broken."""
    monkeypatch.setattr("gp_core.kernel.PING", 0.2)
    monkeypatch.setattr("gp_core.kernel.RELAY_PING", 0.2)
    monkeypatch.setattr("gp_core.rendezvous.SWEEP", 0.1)
    addresses, lines = KernelServer.addresses, []

    async def through() -> None:
        from gp_core.runtime import runtime
        from gp_core.server import kernel_server

        await runtime().call(kernel_server().open())
        line = Line(kernel_server().port)
        port = await line.open()
        lines.append(line)
        monkeypatch.setattr(KernelServer, "addresses", lambda self, *, local: [f"127.0.0.1:{port}"])

    await through()
    await tiny.start_kernel()
    try:
        kernel = tiny.provisioner._kernel
        pids = set(installation.processes())
        lines[0].whole = False
        deadline = time.monotonic() + 10
        while kernel.session is not None and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        assert kernel.session is None
        for _ in range(30):
            assert await tiny.is_alive()
            await asyncio.sleep(0.1)
        lines[0].whole = True
        deadline = time.monotonic() + 40
        while kernel.session is None and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        assert kernel.session is not None
        assert await tiny.is_alive()
        assert set(installation.processes()) == pids
    finally:
        await tiny.shutdown_kernel(now=True)
        await lines[0].close()
        assert addresses


async def test_fifty_kernels_start_beside_two_thousand_idle_strangers(
    installation: Installation, tiny: AsyncKernelManager
) -> None:
    installation.jupyter.install_spec("crowd", TINY_SPEC, config={"launch_timeout": 120})
    await tiny.start_kernel()
    port = tiny.provisioner._kernel.server.port
    idle = await asyncio.to_thread(
        lambda: [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(2000)]
    )
    managers = [AsyncKernelManager(kernel_name="crowd") for _ in range(50)]
    try:
        await asyncio.gather(*(manager.start_kernel() for manager in managers))
        assert all([await manager.is_alive() for manager in managers])
    finally:
        for one in idle:
            one.close()
        await asyncio.gather(
            *(manager.shutdown_kernel(now=True) for manager in (tiny, *managers) if manager.has_kernel)
        )


# The disk


@pytest.mark.parametrize("options", ["size=4k", "size=1m,ro"])
async def test_a_full_or_read_only_runtime_folder_is_named(
    tiny: AsyncKernelManager, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: str
) -> None:
    if os.getuid() != 0:
        pytest.skip("mounting a small file system needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(tmp_path)], check=True)
    try:
        if "ro" not in options:
            (tmp_path / "ballast").write_bytes(b"x" * 4096)
        monkeypatch.setenv("GP_RUNTIME_DIR", str(tmp_path))
        with pytest.raises(LaunchFailed) as caught:
            await tiny.start_kernel()
        assert caught.value.failure is NO_SPACE
        assert str(tmp_path) in str(caught.value)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
