"""A running kernel changes hands: its server is killed, and `start_kernel(kernel_id=ID)` elsewhere takes it over."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client import AsyncKernelManager, KernelManager
from jupyter_client.ioloop import AsyncIOLoopKernelManager

from gp_core import server as server_module
from gp_core import takeover
from gp_core.errors import (
    CALLBACK_PORT_TAKEN,
    ENDPOINT_TAKEN,
    LAUNCHER_NOT_BACK,
    OWNED,
    SERVER_KEY_CHANGED,
    BackendError,
    ConfigError,
    LaunchDenied,
    LaunchFailed,
    LaunchTimeout,
)
from gp_core.local import LocalBackend
from gp_core.runtime import runtime
from gp_core.server import kernel_server
from gp_core.store import FileStore, Record

from .conftest import TINY, Specs, ask, kernelspec, launchers, nothing_left, until

ID = "5f1c9a52-0000-4000-8000-000000000001"

OWNER = """
import json, os, signal, sys
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from gp_core import kernel, local, starting

class Specs(KernelSpecManager):
    def get_kernel_spec(self, name):
        return KernelSpec(**json.loads(os.environ["OWNER_SPEC"]))

kernel.FAREWELL = 0.1
manager = KernelManager(
    kernel_name="tiny", kernel_spec_manager=Specs(), kernel_id=os.environ["OWNER_ID"], connection_file=sys.argv[1]
)
exec(os.environ.get("OWNER_PATCH", ""))
try:
    manager.start_kernel(**json.loads(os.environ.get("OWNER_KWARGS", "{}")))
except Exception as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}), flush=True)
    os._exit(1)
info = manager.get_connection_info()
print(json.dumps({**info, "key": info["key"].decode(), "pid": os.getpid()}), flush=True)
exec(sys.stdin.readline())
"""


class OwnerProcess:
    """A process that starts a tiny kernel, or takes it over, and says so."""

    def __init__(self, folder: Path, spec: Any, **variables: str) -> None:
        self.file = folder / f"kernel-{ID}.json"
        environ = {**os.environ, "OWNER_SPEC": json.dumps(spec.to_dict()), "OWNER_ID": ID, **variables}
        argv = [sys.executable, "-c", OWNER, str(self.file)]
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ, cwd=folder
        )

    def hear(self) -> dict[str, Any]:
        """What it says after the start; {} if it was killed before."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        heard: dict[str, Any] = json.loads(line) if line else {}
        return heard

    def say(self, code: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(code + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


Own = Callable[..., OwnerProcess]
Make = Callable[..., AsyncKernelManager]


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Own]:
    """Make a process that owns the tiny kernel; see `kernelspec` for the arguments, and OWNER for the variables."""
    made: list[OwnerProcess] = []

    def start(*argv: str, variables: dict[str, str] | None = None, **more: Any) -> OwnerProcess:
        made.append(OwnerProcess(tmp_path, kernelspec(*argv, **more), **(variables or {})))
        return made[-1]

    yield start
    for one in made:
        one.close()
    for left in launchers():
        left.kill()


def record(installation: Path) -> Record:
    found = FileStore(installation / "kernels").get(ID)
    assert found is not None
    return found


def port_of(found: Record) -> int:
    return int(found.bind.rpartition(":")[2])


def orphan(own: Own, *argv: str, **more: Any) -> dict[str, Any]:
    """A kernel whose server was killed; returns what the server said of it."""
    owner = own(*argv, **more)
    told = owner.hear()
    assert "shell_port" in told, told
    owner.kill()
    return told


async def test_a_kernel_of_a_killed_server_is_taken_over(
    own: Own, manager: Make, installation: Path, events: list[str], tmp_path: Path
) -> None:
    owner = own()
    told = owner.hear()
    running = launchers()
    file = json.loads(owner.file.read_text())
    owner.kill()
    km = manager()
    km.connection_file = str(owner.file)
    await km.start_kernel(kernel_id=ID)
    info = km.get_connection_info()
    assert {**info, "key": info["key"].decode()} == {name: told[name] for name in info}
    assert km.provisioner.connection_info["key"] == km.session.key
    assert launchers() == running
    taken = record(installation)
    assert (taken.owner, taken.state) == (kernel_server().owner, "running")
    assert "adopted" in events
    assert "launching" not in events
    assert json.loads(owner.file.read_text()) == {**file, "kernel_name": "tiny"}
    assert await km.is_alive()
    await km.shutdown_kernel(now=True)
    assert not owner.file.exists(), "the former server's file holds the key"
    await nothing_left(installation)


def test_a_blocking_manager_takes_over_too(own: Own, installation: Path) -> None:
    told = orphan(own)
    km = KernelManager(kernel_name="tiny", kernel_spec_manager=Specs(kernelspec()), kernel_id=ID)
    km.start_kernel()
    assert km.shell_port == told["shell_port"]
    assert km.is_alive()
    km.restart_kernel(now=True)
    assert km.shell_port == told["shell_port"]
    km.shutdown_kernel(now=True)


async def test_everything_works_afterwards(own: Own, manager: Make, installation: Path) -> None:
    told = orphan(own)
    km = manager()
    await km.start_kernel(kernel_id=ID)
    first = ask(km)
    await km.interrupt_kernel()
    await until(lambda: ask(km)["signals"])
    assert ask(km)["pid"] == first["pid"]
    (launcher,) = launchers()
    await km.restart_kernel(now=True, env={**os.environ, "NEW": "1"})
    seen = ask(km)
    assert seen["pid"] != first["pid"]
    assert seen["env"]["NEW"] == "1"
    assert launchers() == [launcher]
    assert km.shell_port == told["shell_port"]
    os.kill(seen["pid"], signal.SIGKILL)
    await until(lambda: km.provisioner._kernel.exit_code is not None)
    assert await km.provisioner.poll() == -signal.SIGKILL
    assert await km.provisioner.wait() == -signal.SIGKILL
    await km.restart_kernel(now=True)
    # without the launcher a restart is a launch, which calls back to this server's own port
    launcher.kill()
    await until(lambda: km.provisioner._kernel.exit_code is not None)
    await km.restart_kernel(now=True)
    assert km.shell_port == told["shell_port"]
    assert port_of(record(installation)) == kernel_server().port
    await km.shutdown_kernel()
    await nothing_left(installation)


async def test_autorestart_works_afterwards(own: Own, installation: Path) -> None:
    orphan(own)
    km = AsyncIOLoopKernelManager(kernel_name="tiny", kernel_spec_manager=Specs(kernelspec()), kernel_id=ID)
    await km.start_kernel()
    restarted: list[str] = []
    km._restarter.stop()
    km._restarter.time_to_dead = 0.05
    km._restarter.start()
    km.add_restart_callback(lambda: restarted.append("restart"), "restart")
    pid = ask(km)["pid"]
    os.kill(pid, signal.SIGKILL)
    await until(lambda: restarted, 10)
    await until(lambda: km.provisioner._kernel.exit_code is None and km.ready.done(), 10)
    assert ask(km)["pid"] != pid
    await km.shutdown_kernel(now=True)
    await nothing_left(installation)


async def test_one_whose_launcher_has_called_already_is_used(own: Own, manager: Make, installation: Path) -> None:
    orphan(own)
    server = kernel_server()
    await runtime().call(server.open())
    await runtime().call(server.listen_at(ID, record(installation).bind))
    await until(lambda: ID in server.kernels and server.kernels[ID].session, 20)
    kept = server.kernels[ID]
    km = manager(config={"launch_timeout": 1})
    await km.start_kernel(kernel_id=ID)
    assert km.provisioner._kernel is kept
    assert await km.is_alive()
    await km.shutdown_kernel(now=True)


async def test_it_can_be_taken_over_again_and_again(own: Own, manager: Make, installation: Path) -> None:
    first = orphan(own)
    second = orphan(own)
    km = manager()
    await km.start_kernel(kernel_id=ID)
    assert first["pid"] != second["pid"]
    assert first["key"] == second["key"] == km.session.key.decode()
    assert len(launchers()) == 1
    await km.shutdown_kernel(now=True)


async def test_a_kernel_that_only_its_launcher_confirms(own: Own, manager: Make) -> None:
    argv, config = ["python3", str(TINY), "{connection_file}", "never"], {"startup_confirmation": "hello"}
    orphan(own, *argv, config=config)
    km = manager(*argv, config=config)
    await km.start_kernel(kernel_id=ID)
    assert await km.is_alive()
    await km.shutdown_kernel(now=True)


@pytest.mark.parametrize("works", [True, False])
async def test_the_backend_may_bring_the_launchers_call_here(
    own: Own, manager: Make, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    told: list[Any] = []

    async def adopt(self: LocalBackend, handle: Any, listener: tuple[str, int]) -> None:
        told.append((handle["kernel_id"], listener))
        if not works:
            raise BackendError("the way is blocked")

    orphan(own)
    monkeypatch.setattr(LocalBackend, "adopt", adopt)
    km = manager()
    await km.start_kernel(kernel_id=ID)
    assert told == [(ID, ("127.0.0.1", kernel_server().port))]
    assert await km.is_alive(), "it comes by another way all the same"
    await km.shutdown_kernel(now=True)


async def test_relayed_channels_have_the_same_endpoints(
    own: Own, manager: Make, installation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"channels": "relay"}
    owner = own(config=config)
    told = owner.hear()
    km = manager(config=config)
    km.shell_port, km.ip = told["shell_port"], told["ip"]
    before = ask(km)
    owner.kill()
    with pytest.raises(ConnectionRefusedError):  # the endpoints are the server's
        ask(km)
    km = manager(config=config)
    await km.start_kernel(kernel_id=ID)
    assert km.shell_port == told["shell_port"]
    assert ask(km)["pid"] == before["pid"]
    await km.restart_kernel(now=True)
    assert km.shell_port == told["shell_port"]
    assert ask(km)["pid"] != before["pid"]
    launchers()[0].kill()
    await until(lambda: km.provisioner._kernel.exit_code is not None)
    await km.restart_kernel(now=True)
    assert km.shell_port == told["shell_port"]
    assert ask(km)["pid"]
    await km.shutdown_kernel(now=True)
    await nothing_left(installation)


async def test_relayed_channels_are_back_before_anybody_asks_for_the_kernel(
    own: Own, manager: Make, installation: Path
) -> None:
    config = {"channels": "relay"}
    told = orphan(own, config=config)
    server, km = kernel_server(), manager(config=config)
    await runtime().call(server.open())
    await runtime().call(server.listen_at(ID, record(installation).bind))
    await until(lambda: ID in server.kernels and server.kernels[ID].session, 20)
    km.shell_port, km.ip = told["shell_port"], told["ip"]
    assert ask(km)["pid"]
    km = manager(config=config)
    await km.start_kernel(kernel_id=ID)
    assert ask(km)["pid"]
    await km.shutdown_kernel(now=True)


async def test_relayed_channels_in_a_private_folder_have_the_same_paths(
    own: Own, manager: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tempfile.mkdtemp(prefix="gp-")  # a socket's path has at most 107 bytes
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", short)
    told = orphan(own, variables={"OWNER_PATCH": f"manager.transport, manager.ip = 'ipc', '{short}/tiny'"})
    path = Path(f"{told['ip']}-{told['shell_port']}")
    assert path.is_socket(), "a killed server leaves it"
    km = manager()  # of tcp: the kernel's clients have the paths
    await km.start_kernel(kernel_id=ID)
    assert (km.transport, km.ip, km.shell_port) == ("ipc", told["ip"], told["shell_port"])
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"?\n")
    assert json.loads(await asyncio.wait_for(reader.read(), 5))["pid"]
    writer.close()
    await km.shutdown_kernel(now=True)
    assert not path.exists()
    shutil.rmtree(short)


async def test_an_endpoint_that_a_stranger_has_is_told_and_the_lease_given_back(
    own: Own, manager: Make, installation: Path
) -> None:
    config = {"channels": "relay"}
    told = orphan(own, config=config)
    former = record(installation)
    with socket.create_server(("127.0.0.1", told["iopub_port"])):
        with pytest.raises(LaunchFailed, match=rf"iopub channel cannot listen .*port {told['iopub_port']}") as caught:
            await manager(config=config).start_kernel(kernel_id=ID)
        assert caught.value.failure is ENDPOINT_TAKEN
        assert record(installation) == former
        assert kernel_server().kernels == {}
    km = manager(config=config)
    await km.start_kernel(kernel_id=ID)
    assert ask(km)["pid"]
    await km.shutdown_kernel(now=True)


@pytest.mark.parametrize(("was", "wanted"), [("direct", "relay"), ("relay", "direct")])
async def test_a_running_kernel_keeps_its_kind_of_channels(own: Own, manager: Make, was: str, wanted: str) -> None:
    told = orphan(own, config={"channels": was})
    km = manager(config={"channels": wanted})
    await km.start_kernel(kernel_id=ID)
    assert (km.shell_port, ask(km)["pid"] > 0) == (told["shell_port"], True)
    await km.restart_kernel(now=True)
    assert (km.shell_port, ask(km)["pid"] > 0) == (told["shell_port"], True)
    assert (km.provisioner._kernel.relay is None) == (was == "direct")
    launchers()[0].kill()  # a new launch is as the kernelspec says now
    await until(lambda: km.provisioner._kernel.exit_code is not None)
    await km.restart_kernel(now=True)
    assert (km.shell_port, ask(km)["pid"] > 0) == (told["shell_port"], True)
    assert (km.provisioner._kernel.relay is None) == (wanted == "direct")
    await km.shutdown_kernel(now=True)


async def test_curve_keys_stay(own: Own, manager: Make) -> None:
    if not hasattr(KernelManager, "transport_encryption"):
        pytest.skip("this jupyter_client has no transport_encryption")
    metadata = {"supported_encryption": "curve"}
    told = orphan(own, metadata=metadata, variables={"OWNER_KWARGS": '{"transport_encryption": "auto"}'})
    km = manager(metadata=metadata)
    await km.start_kernel(kernel_id=ID)
    assert km.curve_publickey == told["curve_publickey"].encode()
    assert km.curve_secretkey == told["curve_secretkey"].encode()
    await km.shutdown_kernel(now=True)


async def test_encryption_that_is_required_is_not_given_up(own: Own, manager: Make) -> None:
    if not hasattr(KernelManager, "transport_encryption"):
        pytest.skip("this jupyter_client has no transport_encryption")
    metadata = {"supported_encryption": "curve"}
    orphan(own, metadata=metadata)
    with pytest.raises(ConfigError, match="transport_encryption is required"):
        await manager(metadata=metadata).start_kernel(kernel_id=ID, transport_encryption="required")


# Refusals: the kernel is left as it was


async def test_a_live_owners_kernel_is_refused_by_name(own: Own, manager: Make, installation: Path) -> None:
    owner = own()
    told = owner.hear()
    with pytest.raises(LaunchFailed, match=rf"pid {told['pid']} at {socket.gethostname()}") as caught:
        await manager().start_kernel(kernel_id=ID)
    assert caught.value.failure is OWNED
    assert record(installation).owner.pid == told["pid"]  # type: ignore[union-attr]
    assert len(launchers()) == 1


async def test_another_manager_of_this_process_is_refused(manager: Make) -> None:
    first = manager()
    await first.start_kernel(kernel_id=ID)
    with pytest.raises(LaunchFailed, match="another manager of this process") as caught:
        await manager().start_kernel(kernel_id=ID)
    assert caught.value.failure is OWNED
    assert ask(first)["pid"]
    await first.shutdown_kernel(now=True)


async def test_another_user_is_refused(
    own: Own, manager: Make, installation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GP_USER_SOURCE", "client")
    monkeypatch.setenv("KERNEL_USERNAME", "ada")
    told = orphan(own)
    former = record(installation)
    km = manager()
    with pytest.raises(LaunchDenied, match="belongs to user 'ada': user 'eve' may not"):
        await km.start_kernel(kernel_id=ID, env={**os.environ, "KERNEL_USERNAME": "eve"})
    assert km.session.key.decode() != told["key"]
    assert record(installation) == former
    km = manager()
    await km.start_kernel(kernel_id=ID, env={**os.environ, "KERNEL_USERNAME": "ada"})
    await km.shutdown_kernel(now=True)


async def test_another_kernelspec_is_refused(own: Own, manager: Make) -> None:
    orphan(own)
    km = manager()
    km.kernel_name = "other"
    with pytest.raises(ConfigError, match="kernelspec 'tiny' and cannot be taken over as one of kernelspec 'other'"):
        await km.start_kernel(kernel_id=ID)


async def test_another_key_is_told(own: Own, manager: Make, installation: Path) -> None:
    orphan(own)
    (launcher,) = launchers()
    for name in ("server.pem", "server-next.pem"):
        (installation / name).unlink()
    with pytest.raises(LaunchFailed, match="another key") as caught:
        await manager().start_kernel(kernel_id=ID)
    assert caught.value.failure is SERVER_KEY_CHANGED
    assert launcher.is_running()
    launcher.kill()


async def test_a_launcher_of_protocol_1_is_not_waited_for(own: Own, manager: Make, installation: Path) -> None:
    orphan(own)
    former = dataclasses.replace(record(installation), launcher_protocol=1)
    FileStore(installation / "kernels").put(former)
    with pytest.raises(LaunchFailed, match="protocol 1, which never calls back") as caught:
        await manager().start_kernel(kernel_id=ID)
    assert caught.value.failure is LAUNCHER_NOT_BACK
    assert record(installation) == former


async def test_a_port_that_a_stranger_has_is_told_and_the_lease_given_back(
    own: Own, manager: Make, installation: Path
) -> None:
    orphan(own)
    former = record(installation)
    with socket.create_server(("127.0.0.1", port_of(former))):
        with pytest.raises(LaunchFailed, match=rf"port {port_of(former)}.*in use.*pid {os.getpid()}") as caught:
            await manager().start_kernel(kernel_id=ID)
        assert caught.value.failure is CALLBACK_PORT_TAKEN
        assert record(installation) == former
    km = manager()
    await km.start_kernel(kernel_id=ID)
    await km.shutdown_kernel(now=True)


async def test_a_user_who_has_enough_gets_no_more(own: Own, manager: Make, installation: Path) -> None:
    config = {"max_kernels_per_user": 1}
    orphan(own, config=config)
    former, first = record(installation), manager(config=config)
    await first.start_kernel()
    with pytest.raises(LaunchDenied, match="max_kernels_per_user"):
        await manager(config=config).start_kernel(kernel_id=ID)
    assert record(installation) == former
    await first.shutdown_kernel(now=True)


async def test_a_launcher_that_does_not_call_is_waited_for_and_left_alone(
    own: Own, manager: Make, installation: Path
) -> None:
    orphan(own)
    former, (launcher,) = record(installation), launchers()
    launcher.suspend()
    with pytest.raises(LaunchTimeout, match=r"has not called back to 127\.0\.0\.1:.*its job: running") as caught:
        await manager(config={"launch_timeout": 0.5}).start_kernel(kernel_id=ID)
    assert caught.value.failure is LAUNCHER_NOT_BACK
    assert record(installation) == former
    assert kernel_server().kernels == {}
    launcher.resume()
    km = manager()
    await km.start_kernel(kernel_id=ID)
    assert launchers() == [launcher]
    await km.shutdown_kernel(now=True)


@pytest.mark.parametrize("where", ["lease", "launcher", "end"])
async def test_a_cancelled_takeover_changes_nothing(
    own: Own, manager: Make, installation: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    orphan(own)
    former, (launcher,) = record(installation), launchers()
    launcher.suspend()
    take, reached, go_on = FileStore.take, threading.Event(), threading.Event()

    def slow(self: FileStore, *args: Any) -> Any:
        taken = take(self, *args)
        reached.set()
        if where == "lease":
            go_on.wait(5)
        return taken

    async def ended(*args: Any) -> Any:
        await take_over(*args)
        over.set()
        await asyncio.sleep(60)

    monkeypatch.setattr(FileStore, "take", slow)
    take_over, over = takeover.take_over, threading.Event()
    if where == "end":
        monkeypatch.setattr(takeover, "take_over", ended)
        launcher.resume()
    task = asyncio.create_task(manager().start_kernel(kernel_id=ID))
    await until(over.is_set if where == "end" else reached.is_set, 20)
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    kernels = kernel_server().kernels
    if where == "end":
        await until(lambda: kernels[ID].user is None)
    else:
        await until(lambda: record(installation) == former)
        await until(lambda: not kernels)
    monkeypatch.setattr(takeover, "take_over", take_over)
    launcher.resume()
    km = manager()
    await km.start_kernel(kernel_id=ID)
    assert launchers() == [launcher]
    await km.shutdown_kernel(now=True)


# A kernel that has ended, or half begun


async def test_a_kernel_that_has_ended_is_started_anew_with_the_same_endpoints(
    own: Own, manager: Make, installation: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = orphan(own)
    (launcher,) = launchers()
    launcher.kill()
    await until(lambda: not launchers())
    km = manager()
    with caplog.at_level("WARNING"):
        await km.start_kernel(kernel_id=ID)
    assert "started anew, without its variables" in caplog.text
    assert (km.shell_port, km.session.key.decode()) == (told["shell_port"], told["key"])
    assert ask(km)["pid"]
    assert len(launchers()) == 1
    await km.shutdown_kernel(now=True)
    await nothing_left(installation)


async def test_the_id_of_a_kernel_that_has_ended_is_free_for_another_kernelspec(own: Own, manager: Make) -> None:
    told = orphan(own)
    launchers()[0].kill()
    await until(lambda: not launchers())
    km = manager()
    km.kernel_name = "other"
    await km.start_kernel(kernel_id=ID)
    assert km.session.key.decode() != told["key"]
    await km.shutdown_kernel(now=True)


async def test_one_whose_kernel_has_ended_and_whose_launcher_waits_is_started_anew(own: Own, manager: Make) -> None:
    told = orphan(own)
    (launcher,) = launchers()
    launcher.suspend()  # else it ends, because nobody is left
    for child in launcher.children():
        child.kill()
    km = manager()
    starting = asyncio.create_task(km.start_kernel(kernel_id=ID))
    await asyncio.sleep(0.3)
    launcher.resume()
    await starting
    assert launchers() != [launcher]
    assert km.shell_port == told["shell_port"]
    await km.shutdown_kernel(now=True)


@pytest.mark.parametrize("handle", [False, True], ids=["unknown job", "known job"])
async def test_a_server_that_died_while_it_started_the_kernel(own: Own, manager: Make, handle: bool) -> None:
    step = ("starting.Start", "_confirm") if handle else ("local.LocalBackend", "launch")
    patch = f"""
launch = {step[0]}.{step[1]}
async def dying(*args, **kwargs):
    if "{step[1]}" == "launch":
        await launch(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
{step[0]}.{step[1]} = dying
"""
    assert own(variables={"OWNER_PATCH": patch}).hear() == {}
    launcher = launchers()[0]  # a fork of it has the same command line, until it is the kernel
    km = manager()
    await km.start_kernel(kernel_id=ID)
    assert launchers() == [launcher]
    assert ask(km)["pid"] in {child.pid for child in launcher.children()}
    await km.shutdown_kernel(now=True)


async def test_a_server_that_died_in_a_restart(own: Own, manager: Make, installation: Path) -> None:
    owner = own()
    owner.hear()
    owner.say(
        "kernel.RemoteKernel._send = lambda self, message: "
        "os.kill(os.getpid(), signal.SIGKILL) if message['type'] == 'restart' else None; "
        "manager._async_shutdown_kernel = lambda **k: __import__('asyncio').sleep(0); manager.restart_kernel(now=True)"
    )
    owner.process.wait(20)
    assert record(installation).run == 2
    km = manager(config={"launch_timeout": 10})
    await km.start_kernel(kernel_id=ID)
    pid = ask(km)["pid"]
    await km.restart_kernel(now=True)
    assert ask(km)["pid"] != pid
    await km.shutdown_kernel(now=True)


async def test_a_record_without_a_job_is_a_new_start(own: Own, manager: Make, installation: Path) -> None:
    patch = """
async def dying(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
local.LocalBackend.launch = dying
"""
    assert own(variables={"OWNER_PATCH": patch}).hear() == {}
    assert record(installation).handle is None
    km = manager()
    await km.start_kernel(kernel_id=ID)
    assert ask(km)["pid"]
    await km.shutdown_kernel(now=True)
    await nothing_left(installation)


async def test_a_platform_that_does_not_tell_starts_no_second_kernel(
    own: Own, manager: Make, installation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = """
launch = local.LocalBackend.launch
async def dying(*args, **kwargs):
    await launch(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
local.LocalBackend.launch = dying
"""
    assert own(variables={"OWNER_PATCH": patch}).hear() == {}
    former = record(installation)

    async def silent(self: LocalBackend, kernel_id: str | None = None) -> Any:
        raise OSError("no answer")

    monkeypatch.setattr(LocalBackend, "discover", silent)
    with pytest.raises(Exception, match="local does not tell: no answer"):
        await manager().start_kernel(kernel_id=ID)
    assert record(installation) == former
    await until(lambda: len(launchers()) == 1)


async def test_a_start_right_after_a_cancelled_one_of_the_same_id(manager: Make, installation: Path) -> None:
    first = asyncio.create_task(manager().start_kernel(kernel_id=ID))
    await until(lambda: launchers())
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    km = manager()
    await km.start_kernel(kernel_id=ID)
    assert len(launchers()) == 1
    await km.shutdown_kernel(now=True)
    await nothing_left(installation)


# Several at once


def test_of_several_servers_exactly_one_wins(own: Own, installation: Path) -> None:
    told = orphan(own)
    heard = [rival.hear() for rival in [own() for _ in range(4)]]
    winners = [one for one in heard if "shell_port" in one]
    losers = [one for one in heard if "error" in one]
    assert len(winners) == 1, heard
    assert len(losers) == 3, heard
    assert winners[0]["shell_port"] == told["shell_port"]
    assert all("[OwnedByAnotherServer]" in one["text"] for one in losers), losers
    assert all(f"pid {winners[0]['pid']} at" in one["text"] for one in losers), losers
    assert len(launchers()) == 1


async def test_of_several_managers_of_one_process_exactly_one_wins(own: Own, manager: Make) -> None:
    orphan(own)
    rivals = [manager() for _ in range(4)]
    results = await asyncio.gather(*(km.start_kernel(kernel_id=ID) for km in rivals), return_exceptions=True)
    (winner,) = [km for km, result in zip(rivals, results, strict=True) if result is None]
    assert all(isinstance(result, LaunchFailed) and result.failure is OWNED for result in results if result is not None)
    assert ask(winner)["pid"]
    await winner.shutdown_kernel(now=True)


async def test_a_server_that_ends_properly_says_when(own: Own, manager: Make, installation: Path) -> None:
    owner = own()
    owner.hear()
    owner.say("sys.exit(0)")
    assert owner.process.wait(20) == 0
    left = record(installation).left
    assert left is not None
    assert time.time() - 20 < left < time.time()
    km = manager()
    await km.start_kernel(kernel_id=ID)
    assert record(installation).left is None
    await km.shutdown_kernel(now=True)


async def test_the_end_of_a_process_that_only_tried_ends_no_kernel_of_others(own: Own, installation: Path) -> None:
    owner = own()
    told = owner.hear()
    (launcher,) = launchers()
    rival = own()
    assert "[OwnedByAnotherServer]" in rival.hear()["text"]
    rival.process.wait(20)
    assert launcher.is_running()
    assert record(installation).owner.pid == told["pid"]  # type: ignore[union-attr]
    assert server_module._server is None
