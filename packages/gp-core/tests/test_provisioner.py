"""The provisioner as jupyter_client drives it, with real launchers and a kernel that does nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import tempfile
import threading
import time
import types
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop
from jupyter_client import AsyncKernelManager, KernelManager
from jupyter_client.ioloop import AsyncIOLoopKernelManager
from tornado.web import HTTPError

from gp_core import kernel as kernel_module
from gp_core import local
from gp_core import plugins as plugins_module
from gp_core._markers import hookimpl
from gp_core.backend import Handle, LaunchRequest, State, Status
from gp_core.errors import (
    COMMAND_NOT_FOUND,
    KERNEL_DIED,
    ConfigError,
    LaunchDenied,
    LaunchFailed,
    LaunchTimeout,
    PluginError,
    StoreError,
)
from gp_core.events import Event, KernelEvent
from gp_core.kernel import RemoteKernel
from gp_core.local import LocalBackend
from gp_core.planning import Planner
from gp_core.runtime import runtime
from gp_core.server import kernel_server
from gp_core.starting import Start
from gp_core.store import FileStore, Record

from .conftest import TINY, Specs, ask, kernelspec, launchers, nothing_left, until

Make = Callable[..., AsyncKernelManager]
PORT_NAMES = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")


def remote(km: AsyncKernelManager) -> RemoteKernel:
    """The kernel behind a manager."""
    found: RemoteKernel = km.provisioner._kernel
    return found


def lost(km: AsyncKernelManager) -> None:
    """Cut the launcher's connection."""
    session = remote(km).session
    assert session is not None
    assert session.transport is not None
    runtime().loop.call_soon_threadsafe(session.transport.abort)


# Start


async def test_a_start_gives_jupyter_what_it_needs(started: AsyncKernelManager) -> None:
    provisioner = started.provisioner
    assert started.has_kernel
    assert await provisioner.poll() is None
    assert await started.is_alive()
    info = started.get_connection_info()
    assert provisioner.connection_info["key"] == info["key"] == started.session.key
    assert all(0 < info[name] <= 65535 for name in PORT_NAMES)
    assert provisioner.connection_info is not type(provisioner).connection_info
    assert json.loads(Path(started.connection_file).read_text())["shell_port"] == info["shell_port"]


async def test_the_kernel_gets_its_environment_and_no_secret(
    manager: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_FAR", "far")
    monkeypatch.setenv("TOKEN_OF_THE_SERVER", "secret")
    km = manager(env={"FROM_SPEC": "${XDG_FAR}-${MINE}"})
    await km.start_kernel(
        env={**os.environ, "MINE": "a$b", "KERNEL_X": "1", "JPY_SESSION_NAME": "nb"}, cwd=str(tmp_path)
    )
    seen = ask(km)
    await km.shutdown_kernel(now=True)
    env = seen["env"]
    assert (env["MINE"], env["KERNEL_X"], env["JPY_SESSION_NAME"]) == ("a$b", "1", "nb")
    assert env["FROM_SPEC"] == "far-a$b"
    assert env["KERNEL_ID"] == km.kernel_id
    assert seen["cwd"] == str(tmp_path)
    assert "GP_LAUNCH_SECRETS" not in env
    assert "TOKEN_OF_THE_SERVER" not in env
    assert int(env["JPY_PARENT_PID"]) != os.getpid()


async def test_a_backend_that_cannot_impersonate_starts_nothing_when_it_is_demanded(
    manager: Make, installation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GP_IMPERSONATION_ENABLED", "1")
    for config in ({}, {"impersonation_enabled": False}):  # policy: a kernelspec cannot take it back
        with pytest.raises(LaunchDenied, match=r"impersonation_enabled.*local backend cannot start one as"):
            await manager(config=config).start_kernel()
    await nothing_left(installation)


async def test_variables_that_an_application_adds_late_travel_too(manager: Make) -> None:
    km = manager()
    command, kwargs = await km._async_pre_start_kernel()
    kwargs["env"]["KERNEL_GATEWAY"] = "1"
    await km._async_launch_kernel(command, **kwargs)
    assert ask(km)["env"]["KERNEL_GATEWAY"] == "1"
    await km.shutdown_kernel(now=True)


async def test_no_secret_can_be_read_anywhere(
    started: AsyncKernelManager, installation: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = started.session.key.decode()
    (launcher,) = launchers()
    argv = " ".join(part for process in [launcher, *launcher.children()] for part in process.cmdline())
    logs = "".join(path.read_text() for path in (installation / "logs").iterdir())
    record = remote(started).record
    shown = repr([record, remote(started).info, remote(started), started.provisioner, started.provisioner._planned])
    for place in (argv, logs, shown, caplog.text):
        assert key not in place
        assert record.token not in place
    assert all(
        path.stat().st_mode & 0o077 == 0 for path in installation.rglob("*") if path.suffix in (".pem", ".json", ".log")
    )


@pytest.mark.parametrize("channels", ["relay", "direct"])
@pytest.mark.parametrize("transport", ["tcp", "ipc"])
async def test_the_managers_transport_is_honoured(
    manager: Make, transport: str, channels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tempfile.mkdtemp(prefix="gp-")  # a socket's path has at most 107 bytes
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", short)
    km = manager("python3", "-c", ANY_TRANSPORT, "{connection_file}", config={"channels": channels})
    km.transport = transport
    await km.start_kernel()
    try:
        assert km.get_connection_info()["transport"] == transport
        if transport == "ipc":
            paths = [Path(f"{km.ip}-{port}") for port in km.ports]
            assert all(path.is_socket() and path.parent == Path(short) for path in paths)
    finally:
        await km.shutdown_kernel(now=True)
    shutil.rmtree(short)


ANY_TRANSPORT = """
import json, socket, sys, time
info = json.load(open(sys.argv[1]))
listening = []
for name in ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port"):
    ipc = info["transport"] == "ipc"
    made = socket.socket(socket.AF_UNIX if ipc else socket.AF_INET)
    made.bind("%s-%d" % (info["ip"], info[name]) if ipc else (info["ip"], info[name]))
    made.listen(5)
    listening.append(made)
time.sleep(600)
"""


async def test_curve_keys_exist_when_they_are_asked_for(manager: Make) -> None:
    km = manager(metadata={"supported_encryption": "curve"})
    if not hasattr(km, "transport_encryption"):
        pytest.skip("this jupyter_client has no transport_encryption")
    await km.start_kernel(transport_encryption="auto")
    before = (km.curve_publickey, km.curve_secretkey)
    await km.restart_kernel(now=True)
    assert (km.curve_publickey, km.curve_secretkey) == before
    assert all(before)
    await km.shutdown_kernel(now=True)
    assert json.dumps(await km.provisioner.get_provisioner_info())


async def test_events_tell_the_life_of_a_kernel_in_order(manager: Make, events: list[str]) -> None:
    km = manager()
    await km.start_kernel()
    await km.restart_kernel(now=True)
    await km.shutdown_kernel(now=True)
    await until(lambda: "removed" in events)
    told = [event for event in events if event != "progress"]
    assert told == [
        "launching",
        "launched",
        "connected",
        "listening",
        "exited",
        "restarting",
        "listening",
        "exited",
        "removed",
    ]


async def test_people_hear_what_a_backend_says_of_its_launch(manager: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    launch = LocalBackend.launch

    class Listener:
        @hookimpl
        async def gp_kernel_event(self, event: KernelEvent) -> None:
            if event.event is Event.PROGRESS:
                heard.append(event.detail)

    async def talks(backend: LocalBackend, request: LaunchRequest) -> Handle:
        request.progress("not on h1: it is dark")
        return await launch(backend, request)

    plugins_module.plugins().register(Listener(), "listener")
    monkeypatch.setattr(LocalBackend, "launch", talks)
    km = manager()
    await km.start_kernel()
    await until(lambda: "not on h1: it is dark" in heard)
    await km.shutdown_kernel(now=True)


# Starts that fail


@pytest.mark.parametrize(
    ("argv", "failure", "words"),
    [
        (
            ["python3", str(TINY), "{connection_file}", "exit:3"],
            KERNEL_DIED,
            ["exit code 3", "the tiny kernel gives up"],
        ),
        (["python3", "-m", "no_such_kernel"], KERNEL_DIED, ["No module named no_such_kernel"]),
        (["/nowhere/python", "-m", "x"], COMMAND_NOT_FOUND, ["/nowhere/python"]),
        (["python3", "-c", "import os; os.kill(os.getpid(), 9)"], KERNEL_DIED, ["signal SIGKILL"]),
    ],
)
async def test_a_kernel_that_dies_says_why_and_leaves_nothing(
    manager: Make, installation: Path, argv: list[str], failure: object, words: list[str]
) -> None:
    km = manager(*argv)
    began = time.monotonic()
    with pytest.raises(LaunchFailed) as caught:
        await km.start_kernel()
    assert time.monotonic() - began < 5
    assert isinstance(caught.value, HTTPError)
    assert caught.value.failure is failure
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not km.has_kernel
    await nothing_left(installation)


async def test_silence_ends_by_the_timeout(manager: Make, installation: Path) -> None:
    km = manager("python3", str(TINY), "{connection_file}", "never", config={"launch_timeout": 0.5})
    with pytest.raises(LaunchTimeout, match="does not listen yet"):
        await km.start_kernel()
    await nothing_left(installation)


async def test_the_launchers_call_can_confirm_a_start(manager: Make) -> None:
    km = manager("python3", str(TINY), "{connection_file}", "never", config={"startup_confirmation": "hello"})
    await km.start_kernel()
    assert await km.is_alive()
    await km.shutdown_kernel(now=True)


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"launch_timeot": 3}, ConfigError, "did you mean launch_timeout"),
        ({"response_port": 1}, ConfigError, "belongs to the whole server"),
        ({"env_passthrough": ["HOME"]}, ConfigError, "operator"),
        ({"launch_timeout": "soon"}, ConfigError, "launch_timeout: 'soon'"),
        ({"port_range": "1..2"}, ConfigError, "must lie within"),
        ({"authorized_users": ["nobody-else"]}, LaunchDenied, "may not start this kernel"),
        ({"unauthorized_users": ["{me}"]}, LaunchDenied, "may not start"),
    ],
)
async def test_a_kernelspec_that_cannot_be_is_refused(
    manager: Make, installation: Path, config: dict[str, Any], error: type[Exception], words: str
) -> None:
    me = psutil.Process().username()
    km = manager(config=json.loads(json.dumps(config).replace("{me}", me)))
    with pytest.raises(error, match=words):
        await km.start_kernel()
    await nothing_left(installation)


async def test_an_old_launcher_in_argv_is_refused_with_advice(manager: Make) -> None:
    km = manager("python3", "/x/launch_ipykernel.py", "--response-address", "{response_address}")
    with pytest.raises(ConfigError, match="jupyter gp install --from"):
        await km.start_kernel()


async def test_a_plugin_can_deny(manager: Make, installation: Path) -> None:
    class Quota:
        @hookimpl
        async def gp_before_launch(self, request: LaunchRequest) -> None:
            raise LaunchDenied(f"{request.kernel_name} has used up the allotment")

    plugins_module.plugins().register(Quota(), "quota")
    with pytest.raises(LaunchDenied, match="allotment") as caught:
        await manager().start_kernel()
    assert caught.value.status_code == 403  # type: ignore[attr-defined]
    await nothing_left(installation)


async def test_a_user_has_no_more_kernels_than_allowed(manager: Make) -> None:
    first, second = manager(config={"max_kernels_per_user": 1}), manager(config={"max_kernels_per_user": 1})
    await first.start_kernel()
    with pytest.raises(LaunchDenied, match="max_kernels_per_user"):
        await second.start_kernel()
    await first.shutdown_kernel(now=True)
    await second.start_kernel()
    await second.shutdown_kernel(now=True)


async def test_pending_kernels_show_the_reason(manager: Make) -> None:
    km = manager("python3", str(TINY), "{connection_file}", "exit:3")
    km.execution_state, km.reason = "starting", ""
    with pytest.raises(LaunchFailed):
        await km.start_kernel()
    assert km.execution_state == "dead"
    assert "exit code 3" in km.reason


STEPS: dict[str, tuple[type, str, int]] = {
    "first record": (FileStore, "put", 1),
    "plugins": (plugins_module.Plugins, "before_launch", 1),
    "backend": (LocalBackend, "launch", 1),
    "second record": (FileStore, "put", 2),
    "confirmation": (Start, "_confirm", 1),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_a_cancelled_start_leaves_nothing(
    manager: Make, installation: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    owner, name, number = STEPS[step]
    original, calls = getattr(owner, name), []
    reached, go_on = threading.Event(), threading.Event()

    def hang(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) != number:
            return original(*args, **kwargs)
        result = original(*args, **kwargs) if after else None
        reached.set()
        go_on.wait(5)
        return result if after else original(*args, **kwargs)

    async def hang_async(*args: Any, **kwargs: Any) -> Any:
        result = await original(*args, **kwargs) if after else None
        reached.set()
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        return result if after else await original(*args, **kwargs)

    monkeypatch.setattr(owner, name, hang_async if asyncio.iscoroutinefunction(original) else hang)
    task = asyncio.create_task(manager().start_kernel())
    assert await asyncio.to_thread(reached.wait, 10)
    task.cancel()
    await asyncio.sleep(0.05)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    monkeypatch.undo()
    os.environ["GP_DATA_DIR"] = str(installation)
    await nothing_left(installation)


async def test_a_start_that_is_cancelled_in_its_backend_disturbs_no_later_one(
    manager: Make, installation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = LocalBackend.launch, []
    reached, go_on = threading.Event(), threading.Event()

    async def slow(self: LocalBackend, request: LaunchRequest) -> Handle:
        calls.append(request.kernel_id)
        reached.set()
        while len(calls) == 1 and not go_on.is_set():
            await asyncio.sleep(0.01)
        return await original(self, request)

    monkeypatch.setattr(LocalBackend, "launch", slow)
    first, second = manager(), manager()
    task = asyncio.create_task(first.start_kernel(kernel_id="k1"))
    assert await asyncio.to_thread(reached.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    again = asyncio.create_task(second.start_kernel(kernel_id="k1"))
    await asyncio.sleep(0.3)
    assert len(calls) == 1, "it waits for what the first one has left"
    go_on.set()
    await again
    await asyncio.sleep(0.5)
    assert ask(second)
    assert kernel_server().store.get("k1") is not None
    await second.shutdown_kernel(now=True)
    await nothing_left(installation)


async def test_a_shutdown_that_is_given_up_goes_on(
    started: AsyncKernelManager, installation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, reached, go_on = LocalBackend.terminate, threading.Event(), threading.Event()

    async def slow(self: LocalBackend, handle: Handle, *, force: bool) -> None:
        reached.set()
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        await original(self, handle, force=force)

    monkeypatch.setattr(LocalBackend, "terminate", slow)
    task = asyncio.create_task(started.shutdown_kernel(now=True))
    assert await asyncio.to_thread(reached.wait, 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    await nothing_left(installation)
    assert not kernel_server().kernels


async def test_a_backend_that_fails_in_the_middle_leaves_nothing(
    manager: Make, installation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LocalBackend.launch

    async def half(self: LocalBackend, request: LaunchRequest) -> Handle:
        await original(self, request)
        raise PluginError("the network broke")

    monkeypatch.setattr(LocalBackend, "launch", half)
    with pytest.raises(PluginError, match="network broke"):
        await manager().start_kernel()
    await nothing_left(installation)


async def test_a_store_that_cannot_be_written_starts_nothing(
    manager: Make, installation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    km = manager()
    (installation / "kernels").parent.mkdir(parents=True)
    (installation / "kernels").write_text("not a folder")
    with pytest.raises(HTTPError, match="cannot be written"):
        await km.start_kernel()
    assert not launchers()


async def test_the_handle_is_on_disk_when_a_start_is_reported(
    manager: Make, installation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FileStore.put

    def slow(self: FileStore, record: Record) -> None:
        time.sleep(0.5 if record.handle else 0)
        original(self, record)

    monkeypatch.setattr(FileStore, "put", slow)
    km = manager()
    await km.start_kernel()
    record = FileStore(installation / "kernels").get(km.kernel_id)
    assert record is not None
    assert record.handle is not None
    await km.shutdown_kernel(now=True)


async def test_a_last_record_that_cannot_be_written_is_told_in_the_log(
    manager: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = FileStore.put

    def full(self: FileStore, record: Record) -> None:
        if record.state == "running":
            raise StoreError("No space left")
        original(self, record)

    monkeypatch.setattr(FileStore, "put", full)
    km = manager()
    await km.start_kernel()
    await until(lambda: f"record of kernel {km.kernel_id} failed" in caplog.text)
    await km.shutdown_kernel(now=True)


async def test_every_plan_has_a_turn_of_the_loop_to_itself(manager: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, turn, planned = asyncio.get_running_loop(), 0, list[int]()
    original = Planner.plan

    def plan(self: Planner, *args: Any) -> Any:
        planned.append(turn)
        return original(self, *args)

    def count() -> None:
        nonlocal turn, timer
        turn, timer = turn + 1, loop.call_soon(count)

    monkeypatch.setattr(Planner, "plan", plan)
    timer = loop.call_soon(count)
    managers = [manager() for _ in range(3)]
    await asyncio.gather(*(km.start_kernel() for km in managers))
    timer.cancel()
    assert len(set(planned)) == 3
    await asyncio.gather(*(km.shutdown_kernel(now=True) for km in managers))


# Restart


async def test_restart_keeps_ports_keys_and_launcher_and_takes_a_new_environment(started: AsyncKernelManager) -> None:
    before, launcher, pid = started.get_connection_info(), launchers(), ask(started)["pid"]
    await started.restart_kernel(now=True, env={**os.environ, "NEW": "1"})
    assert started.get_connection_info() == before
    assert launchers() == launcher
    seen = ask(started)
    assert seen["pid"] != pid
    assert seen["env"]["NEW"] == "1"


async def test_an_early_autorestart_that_wants_new_ports_gets_the_same(started: AsyncKernelManager) -> None:
    before = started.get_connection_info()
    await started.restart_kernel(now=True, newports=True)
    assert started.get_connection_info() == before
    assert Path(started.connection_file).exists()


async def test_without_its_launcher_a_restart_is_a_launch_with_the_same_ports_and_keys(
    started: AsyncKernelManager,
) -> None:
    before, (launcher,) = started.get_connection_info(), launchers()
    launcher.kill()
    await until(lambda: remote(started).exit_code is not None)
    await started.restart_kernel(now=True)
    assert started.get_connection_info() == before
    assert launchers()[0].pid != launcher.pid
    assert ask(started)["pid"]


@types.coroutine
def cancelled_at(coroutine: Coroutine[Any, Any, Any], number: int) -> Generator[Any, Any, None]:
    """Run a coroutine in the current task, which is cancelled where it waits for the number-th time."""
    future, waits = coroutine.send(None), 1
    with contextlib.suppress(StopIteration):
        while True:
            if waits == number:
                asyncio.current_task().cancel()  # type: ignore[union-attr]
            try:
                value = yield future
            except BaseException as error:
                future = coroutine.throw(error)
            else:
                future = coroutine.send(value)
            waits += 1


@pytest.mark.parametrize("now", [True, False])
async def test_a_restart_that_is_cancelled_at_any_await_can_be_tried_again(
    manager: Make, installation: Path, now: bool
) -> None:
    km = manager()
    km.shutdown_wait_time = 0.3  # the tiny kernel does not know the request
    await km.start_kernel()
    number, cancelled = 0, True
    while cancelled:
        number += 1

        async def restart(at: int = number) -> None:
            await cancelled_at(km.restart_kernel(now=now), at)

        cancelled = (await asyncio.gather(asyncio.create_task(restart()), return_exceptions=True))[0] is not None
        if cancelled:
            await km.restart_kernel(now=True)
            assert ask(km)["pid"]
    assert number > 2  # a busy machine waits less often: what it would wait for is there already
    await km.shutdown_kernel(now=True)
    await nothing_left(installation)


async def test_a_restart_that_fails_can_be_tried_again(started: AsyncKernelManager) -> None:
    argv = started.kernel_spec.argv[:]
    started.kernel_spec.argv[-1] = "exit:4"
    with pytest.raises(LaunchFailed, match="exit code 4"):
        await started.restart_kernel(now=True)
    assert not await started.is_alive()
    started.kernel_spec.argv[:] = argv
    await started.restart_kernel(now=True)
    assert await started.is_alive()


async def test_an_autorestart_that_fails_again_and_again_ends_in_dead(manager: Make, tmp_path: Path) -> None:
    """As with a local kernel: five tries, then everybody is told; never "restarting" for ever."""
    once = tmp_path / "once"
    script = f"import os, runpy, sys; os.path.exists({str(once)!r}) and sys.exit(5); sys.argv[:] = sys.argv[1:]"
    script += "; runpy.run_path(sys.argv[0], run_name='__main__')"
    specs = Specs(kernelspec("python3", "-c", script, str(TINY), "{connection_file}", "serve"))
    km = AsyncIOLoopKernelManager(kernel_name="tiny", kernel_spec_manager=specs)
    told: list[str] = []
    await km.start_kernel()
    km._restarter.stop()
    km._restarter.time_to_dead = 0.05
    km._restarter.start()
    for event in ("restart", "dead"):
        km.add_restart_callback(lambda event=event: told.append(event), event)
    once.touch()
    os.kill(ask(km)["pid"], signal.SIGKILL)
    await until(lambda: "dead" in told, 30)
    assert told == ["restart"] * 5 + ["dead"]
    assert not await km.is_alive()
    await km.shutdown_kernel(now=True)


async def test_a_kernelspec_that_names_our_launcher_restarts_too(manager: Make) -> None:
    options = ["--kernel-id", "{kernel_id}", "--response-address", "{response_address}", "--public-key", "{public_key}"]
    km = manager("python3", "-m", "gp_launchers", *options, "--", "python3", str(TINY), "{connection_file}", "serve")
    await km.start_kernel()
    first = ask(km)["pid"]
    for now in (True, False):
        await km.restart_kernel(now=now)
        assert ask(km)["pid"] != first
    await km.shutdown_kernel(now=True)


async def test_a_plugin_that_fails_to_say_a_timeout_leaves_nothing(manager: Make, installation: Path) -> None:
    class Broken:
        @hookimpl
        def gp_timeout(self, phase: str) -> float:
            raise ValueError("no idea")

    plugins_module.plugins().register(Broken(), "broken")
    km = manager()
    with pytest.raises(PluginError, match="how long 'launch' may take: ValueError: no idea"):
        await km.start_kernel()
    await nothing_left(installation)


async def test_a_restart_survives_a_lost_session(started: AsyncKernelManager) -> None:
    launcher = launchers()
    lost(started)
    await started.restart_kernel(now=True)
    assert await started.is_alive()
    assert launchers() == launcher


# Life and death


async def test_death_is_seen_at_once_with_its_code(started: AsyncKernelManager) -> None:
    os.kill(ask(started)["pid"], signal.SIGKILL)
    await until(lambda: remote(started).exit_code is not None, 1)
    assert await started.provisioner.poll() == -signal.SIGKILL
    assert not await started.is_alive()
    await started.provisioner.send_signal(signal.SIGINT)  # a no-op now
    assert await started.provisioner.wait() == -signal.SIGKILL
    assert not started.has_kernel


async def test_a_killed_launcher_takes_its_kernel_along_and_is_seen(started: AsyncKernelManager) -> None:
    pid = ask(started)["pid"]
    launchers()[0].kill()
    await until(lambda: remote(started).exit_code is not None, 2)
    await until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


async def test_the_platform_says_why_after_the_launcher_told_of_the_end(
    started: AsyncKernelManager, events: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    cancelled = Status(state=State.GONE, detail="job 7 is CANCELLED by ada")
    monkeypatch.setattr(LocalBackend, "_gone", lambda self, handle: cancelled)
    launchers()[0].terminate()  # it ends its kernel, tells of that, and goes
    await until(lambda: "gone" in events)
    assert events.index("exited") < events.index("gone")
    assert "CANCELLED by ada" in caplog.text
    assert await started.provisioner.poll() == -signal.SIGTERM, "the kernel's own end, not the job's"


async def test_signals_reach_the_kernel(started: AsyncKernelManager) -> None:
    for number in range(1, 4):
        await started.interrupt_kernel()
        await until(lambda: len(ask(started)["signals"]) == number)  # noqa: B023
    assert await started.is_alive()


async def test_a_lost_session_is_not_a_dead_kernel(started: AsyncKernelManager, events: list[str]) -> None:
    pid = ask(started)["pid"]
    lost(started)
    assert await started.is_alive()
    await until(lambda: "resumed" in events)
    assert await started.is_alive()
    assert events.count("lost") == 1
    await started.interrupt_kernel()
    await until(lambda: ask(started)["signals"])
    assert ask(started)["pid"] == pid


async def test_a_death_in_a_blackout_is_told_afterwards(started: AsyncKernelManager) -> None:
    pid = ask(started)["pid"]
    launchers()[0].suspend()
    lost(started)
    os.kill(pid, signal.SIGKILL)
    await asyncio.sleep(0.1)
    assert await started.is_alive()
    launchers()[0].resume()
    await until(lambda: remote(started).exit_code is not None)
    assert await started.provisioner.poll() == -signal.SIGKILL


async def test_kill_works_without_a_session(started: AsyncKernelManager, monkeypatch: pytest.MonkeyPatch) -> None:
    lost(started)
    await until(lambda: remote(started).session is None)
    await started.shutdown_kernel(now=True)
    assert not launchers()


async def test_a_dead_kernel_that_nobody_wants_is_removed(
    started: AsyncKernelManager, installation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_module, "LINGER", 0.2)
    os.kill(ask(started)["pid"], signal.SIGKILL)
    await nothing_left(installation)


async def test_a_restart_in_time_keeps_it(started: AsyncKernelManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_module, "LINGER", 0.3)
    os.kill(ask(started)["pid"], signal.SIGKILL)
    await until(lambda: remote(started).exit_code is not None)
    await started.restart_kernel(now=True)
    await asyncio.sleep(0.4)
    assert await started.is_alive()


async def test_cleanup_ends_everything_and_can_be_repeated(started: AsyncKernelManager, installation: Path) -> None:
    await started.provisioner.cleanup(restart=False)
    await started.provisioner.cleanup(restart=False)
    assert not started.has_kernel
    await nothing_left(installation)


# Persistence


async def test_provisioner_info_is_json_and_seals_its_secrets(started: AsyncKernelManager, manager: Make) -> None:
    text = json.dumps(await started.provisioner.get_provisioner_info())
    assert started.session.key.decode() not in text
    other = manager()
    await other._async_pre_start_kernel()
    await other.provisioner.load_provisioner_info(json.loads(text))
    assert other.provisioner.kernel_id == started.kernel_id
    assert other.provisioner.connection_info == started.provisioner.connection_info


# Loops and threads


def test_a_blocking_manager_works_without_and_inside_of_a_loop(installation: Path) -> None:
    def life() -> None:
        km = KernelManager(kernel_name="tiny", kernel_spec_manager=Specs(kernelspec()))
        km.start_kernel()
        assert km.is_alive()
        km.restart_kernel(now=True)
        km.shutdown_kernel(now=True)

    life()

    async def inside() -> None:
        life()

    asyncio.run(inside())
    asyncio.run(inside())


async def test_old_logs_go_and_starts_that_come_together_do_not_mind(
    manager: Make, installation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "KEPT_LOGS", 3)
    (installation / "logs").mkdir(parents=True)
    for number in range(40):
        log = installation / "logs" / f"{number}.log"
        log.touch()
        os.utime(log, (number, number))
    managers = [manager() for _ in range(6)]
    await asyncio.gather(*(km.start_kernel() for km in managers))
    await asyncio.gather(*(km.shutdown_kernel(now=True) for km in managers))
    assert not (installation / "logs" / "0.log").exists()
    kept = [km for km in managers if (installation / "logs" / f"{km.kernel_id}.log").exists()]
    assert len(kept) >= 3  # starts that come together have no order


async def test_many_kernels_at_once(manager: Make, installation: Path) -> None:
    managers = [manager() for _ in range(12)]
    await asyncio.gather(*(km.start_kernel() for km in managers))
    pids = {ask(km)["pid"] for km in managers}
    assert len(pids) == len(managers)
    await asyncio.gather(*(km.shutdown_kernel(now=True) for km in managers))
    await nothing_left(installation)


def test_event_names_are_distinct() -> None:
    assert len({event.value for event in Event}) == len(Event)


def test_a_host_application_may_have_a_loop_of_its_own(manager: Make) -> None:
    async def life() -> None:
        km = manager()
        await km.start_kernel()
        assert await km.is_alive()
        await km.shutdown_kernel(now=True)

    uvloop.run(life())
