"""KernelManager, blocking and async: a whole life, restarts, deaths, transports, environment."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zmq.asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.ioloop.manager import AsyncIOLoopKernelManager, IOLoopKernelManager
from jupyter_client.manager import AsyncKernelManager, KernelManager
from jupyter_core.utils import ensure_async
from support.driven import Driven, driven
from support.installation import Installation, wait_until
from traitlets.config import Config

from gp_core.errors import LaunchDenied, LaunchFailed, LaunchTimeout

pytestmark = pytest.mark.timeout(120)

PID = "import os; print(os.getpid())"
ENDLESS = "print('running', flush=True)\nwhile True: pass"


@pytest.fixture
def spec(installation: Installation, ipykernel_spec: Path) -> str:
    """Name of a kernelspec of ipykernel with only our stanza."""
    installation.jupyter.install_spec("remote", ipykernel_spec)
    return "remote"


@pytest.fixture(params=[KernelManager, AsyncKernelManager], ids=["blocking", "async"])
def manager_class(request: pytest.FixtureRequest) -> Iterator[type[KernelManager]]:
    """Both kinds of manager."""
    return request.param  # type: ignore[no-any-return]


# -- a whole life


def test_life(installation: Installation, spec: str, manager_class: type[KernelManager]) -> None:
    with driven(manager_class(kernel_name=spec)) as kernel:
        manager, info = kernel.manager, kernel.manager.get_connection_info()
        assert kernel.alive
        assert kernel.run("6*7") == "42"

        cell = kernel.start_cell(ENDLESS, "running")
        kernel.do(manager.interrupt_kernel())
        assert kernel.reply(cell)["ename"] == "KeyboardInterrupt"

        first = kernel.run(PID)
        assert kernel.run("x = 1; x") == "1"
        kernel.restart()
        second = kernel.run(PID)
        assert second != first
        assert kernel.run("x") == "NameError"
        kernel.restart(now=True)
        assert kernel.run(PID) not in (first, second)
        assert manager.get_connection_info() == info, "ports and keys stay over restarts"

        kernel.do(manager.shutdown_kernel())
        assert not kernel.alive
        assert not manager.has_kernel
        installation.check_nothing_left()


def test_shutdown_now(installation: Installation, spec: str, manager_class: type[KernelManager]) -> None:
    with driven(manager_class(kernel_name=spec)) as kernel:
        kernel.do(kernel.manager.shutdown_kernel(now=True))
        assert not kernel.manager.has_kernel
        installation.check_nothing_left()


def test_shutdown_of_a_busy_kernel(installation: Installation, spec: str, manager_class: type[KernelManager]) -> None:
    with driven(manager_class(kernel_name=spec)) as kernel:
        deaf = "import signal\nfor each in (signal.SIGINT, signal.SIGTERM): signal.signal(each, signal.SIG_IGN)\n"
        kernel.start_cell(deaf + ENDLESS, "running")
        began = time.monotonic()
        kernel.do(kernel.manager.shutdown_kernel())
        assert time.monotonic() - began < 15
        installation.check_nothing_left()


def test_manager_starts_again_after_a_shutdown(
    installation: Installation, spec: str, manager_class: type[KernelManager]
) -> None:
    # a context that the manager did not make itself stays usable after a shutdown
    with zmq.asyncio.Context() as context, driven(manager_class(kernel_name=spec, context=context)) as kernel:
        assert kernel.run("6*7") == "42"
        kernel.client.stop_channels()
        kernel.do(kernel.manager.shutdown_kernel())
        kernel.start()
        assert kernel.run("6*7") == "42"


def test_interrupts_of_an_idle_kernel_are_harmless(
    installation: Installation, spec: str, manager_class: type[KernelManager]
) -> None:
    with driven(manager_class(kernel_name=spec)) as kernel:
        for _ in range(3):
            kernel.do(kernel.manager.interrupt_kernel())
        assert kernel.run("6*7") == "42"


def test_interrupt_reaches_children_of_the_kernel(installation: Installation, spec: str) -> None:
    with driven(KernelManager(kernel_name=spec)) as kernel:
        cell = kernel.start_cell(
            "print('running', flush=True)\nimport os; os.system('sleep 60')\nprint('on')", "running"
        )
        wait_until(lambda: any("sleep 60" in line for line in installation.processes().values()), 10)
        kernel.manager.interrupt_kernel()
        kernel.reply(cell)
        wait_until(lambda: not any("sleep 60" in line for line in installation.processes().values()), 10)


def test_other_signals_reach_the_kernel(
    installation: Installation, spec: str, manager_class: type[KernelManager]
) -> None:
    with driven(manager_class(kernel_name=spec)) as kernel:
        cell = kernel.start_cell(
            "import signal, time; got = []; signal.signal(signal.SIGUSR1, lambda *a: got.append('usr1'))\n"
            "print('running', flush=True)\nwhile not got: time.sleep(0.01)\nprint(got[0])",
            "running",
        )
        kernel.do(kernel.manager.signal_kernel(signal.SIGUSR1))
        assert kernel.reply(cell)["status"] == "ok"


def test_new_environment_arrives_with_a_restart(
    installation: Installation, spec: str, manager_class: type[KernelManager]
) -> None:
    with driven(manager_class(kernel_name=spec), env={**os.environ, "COLOUR": "red"}) as kernel:
        show = "import os; print(os.environ['COLOUR'], end='')"
        assert kernel.run(show) == "red"
        kernel.manager.update_env(env={"COLOUR": "green"})
        kernel.restart()
        assert kernel.run(show) == "green"


def test_restart_of_a_launcher_that_is_gone_keeps_ports_and_keys(
    installation: Installation, spec: str, manager_class: type[KernelManager]
) -> None:
    with driven(manager_class(kernel_name=spec)) as kernel:
        info = kernel.manager.get_connection_info()
        launcher = int(kernel.run("import os; print(os.getppid())"))
        os.kill(launcher, signal.SIGKILL)
        wait_until(lambda: not kernel.alive, 10)
        installation.sweep()
        kernel.restart()
        assert kernel.manager.get_connection_info() == info
        assert kernel.run("6*7") == "42"


def test_blocking_manager_inside_a_running_loop(installation: Installation, spec: str) -> None:
    async def main() -> str:
        with driven(KernelManager(kernel_name=spec)) as kernel:
            kernel.restart()
            return kernel.run("6*7")

    assert asyncio.run(main()) == "42"
    assert asyncio.run(main()) == "42", "and in a second loop"


# -- deaths


def test_death_is_seen(installation: Installation, spec: str, manager_class: type[KernelManager]) -> None:
    with driven(manager_class(kernel_name=spec)) as kernel:
        os.kill(int(kernel.run(PID)), signal.SIGKILL)
        wait_until(lambda: not kernel.alive, 5)
        assert kernel.exit_code == -signal.SIGKILL
        kernel.restart()
        assert kernel.run("6*7") == "42"


def test_exit_code_is_told(installation: Installation, spec: str, manager_class: type[KernelManager]) -> None:
    with driven(manager_class(kernel_name=spec)) as kernel:
        kernel.client.execute("import os; os._exit(17)")
        wait_until(lambda: not kernel.alive, 5)
        assert kernel.exit_code == 17


FAST = Config({"KernelRestarter": {"time_to_dead": 0.2, "stable_start_time": 1.0}})


async def happens(condition: Callable[[], object], within: float) -> None:
    """Wait for a condition while the loop runs; the condition may be async."""
    deadline = time.monotonic() + within
    while not await ensure_async(condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


@dataclass
class Watched:
    """A kernel under the eyes of a restarter, in a running loop.

    Args:
        manager: Of the kernel.
        told: What the restarter has called back.
        client: Async, whatever the manager is, so that the loop runs on.
    """

    manager: Any
    told: list[str]
    client: AsyncKernelClient

    async def run(self, code: str) -> str:
        """Run a cell as soon as the kernel answers, and return what it printed."""
        seen: list[str] = []
        message = self.client.execute_interactive(
            code, timeout=60, output_hook=lambda message: seen.append(message["content"].get("text", ""))
        )
        await asyncio.wait_for(message, 60)
        return "".join(seen)

    async def kill(self) -> int:
        """Kill the kernel and return its pid."""
        pid = int(await self.run(PID))
        os.kill(pid, signal.SIGKILL)
        return pid


@asynccontextmanager
async def watched(manager: Any) -> AsyncIterator[Watched]:
    """Start a kernel, and shut it down at the end of the block."""
    await ensure_async(manager.start_kernel())
    client = AsyncKernelClient()
    try:
        told: list[str] = []
        # there is no restarter before the start
        manager.add_restart_callback(lambda: told.append("restart"), "restart")
        manager.add_restart_callback(lambda: told.append("dead"), "dead")
        client.load_connection_info(manager.get_connection_info())
        client.start_channels(hb=False)
        await client.wait_for_ready(timeout=60)
        yield Watched(manager, told, client)
    finally:
        client.stop_channels()
        await ensure_async(manager.shutdown_kernel(now=True))


@pytest.fixture(params=[AsyncIOLoopKernelManager, IOLoopKernelManager], ids=["async", "blocking"])
def restarting_class(request: pytest.FixtureRequest) -> Any:
    """Both kinds of manager that restart a kernel that has died."""
    return request.param


async def test_autorestart(installation: Installation, spec: str, restarting_class: Any) -> None:
    async with watched(restarting_class(kernel_name=spec, config=FAST)) as kernel:
        info = kernel.manager.get_connection_info()
        for times in (1, 2):
            pid = await kernel.kill()
            await happens(lambda: len(kernel.told) == times, 10)  # noqa: B023
            await happens(kernel.manager.is_alive, 20)
            await kernel.client.wait_for_ready(timeout=60)
            assert int(await kernel.run(PID)) != pid
        assert kernel.told == ["restart", "restart"]
        assert kernel.manager.get_connection_info() == info, "the clients' sockets must go on working"


async def test_autorestart_gives_up(installation: Installation, ipykernel_spec: Path, restarting_class: Any) -> None:
    broken = installation.home / "broken"
    ipykernel = json.loads((ipykernel_spec / "kernel.json").read_text())["argv"]
    script = f'test -e {broken} && {{ echo it is broken now >&2; exit 3; }}; exec "$@"'
    installation.jupyter.install_spec("fragile", {"argv": ["sh", "-c", script, "sh", *ipykernel]})
    async with watched(restarting_class(kernel_name="fragile", config=FAST)) as kernel:
        broken.touch()
        await kernel.kill()
        await happens(lambda: "dead" in kernel.told, 30)
        assert kernel.told == ["restart"] * 5 + ["dead"], "as with a local kernel"
        assert not await ensure_async(kernel.manager.is_alive())


# -- kernels that do not start


def failing_start(name: str, manager_class: type[KernelManager], expected: type[Exception] = LaunchFailed) -> Any:
    """Start a kernel that cannot, and return the error."""
    with driven(manager_class(kernel_name=name), start=False) as kernel:
        with pytest.raises(expected) as raised:
            kernel.start()
        assert not kernel.manager.has_kernel
        return raised.value


def test_kernel_that_dies_at_once(installation: Installation, manager_class: type[KernelManager]) -> None:
    script = (
        "import pathlib, sys, time\n"
        "print('line one', file=sys.stderr); print('ModuleNotFoundError: no spoon', file=sys.stderr, flush=True)\n"
        "pathlib.Path(sys.argv[1]).write_text(repr(time.time())); sys.exit(3)"
    )
    death = installation.home / "death"
    installation.jupyter.install_spec("dying", {"argv": ["python3", "-c", script, str(death)]})
    error = failing_start("dying", manager_class)
    delay = time.time() - float(death.read_text())
    assert delay < 0.5 + 0.2, "0.5 s after its death, and what the kernel's own exit takes"
    assert error.exit_code == 3
    for part in ("exit code 3", "line one\nModuleNotFoundError: no spoon", "KernelDied", "dying"):
        assert part in str(error)
    installation.check_nothing_left()


@pytest.mark.parametrize(
    ("kernelspec", "code", "texts"),
    [
        (
            {"argv": ["python3", "-I", "-S", "-m", "ipykernel_launcher", "-f", "{connection_file}"]},
            1,
            ["KernelDied", "No module named ipykernel_launcher", "exit code 1"],
        ),
        ({"argv": ["/nowhere/at/all", "{connection_file}"]}, None, ["CommandNotFound", "/nowhere/at/all"]),
        ({"argv": ["gp-no-such-command", "{connection_file}"]}, None, ["CommandNotFound", "gp-no-such-command"]),
        ({"argv": ["/etc/passwd", "{connection_file}"]}, None, ["/etc/passwd"]),
        (
            {
                "argv": ["python3", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                "env": {"PYTHONHOME": "/nowhere"},
            },
            1,
            ["KernelDied", "encodings", "exit code 1"],
        ),
        (
            {"argv": ["python3", "-m", "ipykernel_launcher", "--no-such-option", "-f"]},
            None,
            ["KernelDied", "exit code"],
        ),
        ({"argv": ["sh", "-c", "kill -SEGV $$"]}, -signal.SIGSEGV, ["KernelDied", "SIGSEGV"]),
        ({"argv": ["true"]}, 0, ["KernelDied", "exit code 0"]),
    ],
    ids=["no-module", "no-file", "no-command", "no-program", "bad-environment", "bad-option", "crash", "exit-0"],
)
def test_kernel_that_cannot_start(
    installation: Installation,
    manager_class: type[KernelManager],
    kernelspec: dict[str, Any],
    code: int | None,
    texts: list[str],
) -> None:
    installation.jupyter.install_spec("broken", kernelspec)
    began = time.monotonic()
    error = failing_start("broken", manager_class)
    assert time.monotonic() - began < 5
    assert [text for text in texts if text not in str(error)] == []
    if code is not None:
        assert error.exit_code == code
    installation.check_nothing_left()


def test_kernel_that_never_listens(installation: Installation, manager_class: type[KernelManager]) -> None:
    installation.jupyter.install_spec("mute", {"argv": ["sleep", "300"]}, config={"launch_timeout": 1.5})
    began = time.monotonic()
    error = failing_start("mute", manager_class, LaunchTimeout)
    assert 1.4 < time.monotonic() - began < 5
    assert "1.5 s" in str(error)
    assert "LaunchTimeout" in str(error)
    installation.check_nothing_left()


def test_start_that_is_cancelled_leaves_nothing(installation: Installation) -> None:
    installation.jupyter.install_spec("mute", {"argv": ["sleep", "300"]})

    async def main() -> None:
        manager = AsyncKernelManager(kernel_name="mute")
        starting = asyncio.ensure_future(manager.start_kernel())
        await happens(lambda: any("sleep 300" in line for line in installation.processes().values()), 20)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    asyncio.run(main())
    installation.check_nothing_left()


def test_denied_start(installation: Installation, spec: str, manager_class: type[KernelManager]) -> None:
    installation.jupyter.install_spec("closed", {"argv": ["true"]}, config={"authorized_users": ["somebody-else"]})
    error = failing_start("closed", manager_class, LaunchDenied)
    assert "authorized_users" in str(error)
    assert error.http_status == 403


# -- transport, folder, environment


@pytest.fixture
def ipc_manager(installation: Installation, spec: str, manager_class: type[KernelManager]) -> KernelManager:
    """A manager whose endpoints are files in the runtime folder."""
    file = installation.jupyter.runtime_dir / "kernel-one.json"
    return manager_class(kernel_name=spec, transport="ipc", connection_file=str(file))


def test_ipc(installation: Installation, ipc_manager: KernelManager) -> None:
    with driven(ipc_manager) as kernel:
        info = kernel.manager.get_connection_info()
        assert info["transport"] == "ipc"
        assert Path(f"{info['ip']}-{info['shell_port']}").is_socket()
        assert kernel.run("6*7") == "42"
        kernel.restart()
        assert kernel.run("6*7") == "42"
        kernel.restart(now=True)
        assert kernel.run("6*7") == "42"
        kernel.do(kernel.manager.shutdown_kernel())
    assert [path.name for path in installation.jupyter.runtime_dir.glob("kernel*")] == []


def test_connection_file_is_the_managers(installation: Installation, spec: str) -> None:
    with driven(KernelManager(kernel_name=spec)) as kernel:
        file = Path(kernel.manager.connection_file)
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0
        written = json.loads(file.read_text())
        info = kernel.manager.get_connection_info()
        assert written["key"] == info["key"].decode()
        assert {name: port for name, port in written.items() if name.endswith("_port")} == {
            name: port for name, port in info.items() if name.endswith("_port")
        }
    assert not file.exists()


@pytest.mark.parametrize(
    ("policy", "declared", "encrypted"),
    [
        ("disabled", True, False),
        ("auto", True, True),
        ("auto", False, False),
        ("required", True, True),
    ],
)
def test_transport_encryption(
    installation: Installation,
    ipykernel_spec: Path,
    manager_class: type[KernelManager],
    policy: str,
    declared: bool,
    encrypted: bool,
) -> None:
    argv = json.loads((ipykernel_spec / "kernel.json").read_text())["argv"]
    metadata = {"supported_encryption": "curve"} if declared else {}
    installation.jupyter.install_spec("curved", {"argv": argv, "metadata": metadata})
    with driven(manager_class(kernel_name="curved", transport_encryption=policy)) as kernel:
        assert ("curve_publickey" in kernel.manager.get_connection_info()) == encrypted
        seen = (
            "from ipykernel.kernelapp import IPKernelApp as A; print(A.instance().curve_publickey is not None, end='')"
        )
        assert kernel.run(seen) == str(encrypted)
        info = kernel.manager.get_connection_info()
        kernel.restart()
        assert kernel.run(seen) == str(encrypted)
        assert kernel.manager.get_connection_info() == info


def test_required_encryption_that_the_kernel_lacks(
    installation: Installation, spec: str, manager_class: type[KernelManager]
) -> None:
    manager = manager_class(kernel_name=spec, transport_encryption="required")
    with driven(manager, start=False) as kernel, pytest.raises(RuntimeError, match="required"):
        kernel.start()


def test_folder(installation: Installation, spec: str, manager_class: type[KernelManager]) -> None:
    folder = installation.home / "work here"
    folder.mkdir()
    with driven(manager_class(kernel_name=spec), cwd=str(folder)) as kernel:
        show = "import os; print(os.getcwd(), end='')"
        assert kernel.run(show) == str(folder)
        assert kernel.manager.resolve_path("a") is None
        (folder / "a").touch()
        assert kernel.manager.resolve_path("a") == str(folder / "a")
        kernel.restart()
        assert kernel.run(show) == str(folder)


SHOW_ENV = "import json, os; print(json.dumps(dict(os.environ)), end='')"


def test_environment(
    installation: Installation,
    ipykernel_spec: Path,
    manager_class: type[KernelManager],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KERNEL_COLOUR", "blue")
    monkeypatch.setenv("JPY_SESSION_NAME", "old.ipynb")
    argv = json.loads((ipykernel_spec / "kernel.json").read_text())["argv"]
    spec_env = {"FROM_SPEC": "s", "HOME_OF_IT": "${HOME}/x", "BOTH": "spec"}
    installation.jupyter.install_spec("remote", {"argv": argv, "env": spec_env})
    requested = {**os.environ, "JPY_SESSION_NAME": "new.ipynb", "CHOSEN": "c$HOME", "BOTH": "request"}
    with driven(manager_class(kernel_name="remote"), env=requested) as kernel:
        seen = json.loads(kernel.run(SHOW_ENV))
        expected = {
            "KERNEL_COLOUR": "blue",
            "JPY_SESSION_NAME": "new.ipynb",
            "FROM_SPEC": "s",
            "HOME_OF_IT": f"{os.environ['HOME']}/x",
            "CHOSEN": "c$HOME",
            "BOTH": "spec",
            "KERNEL_ID": kernel.manager.kernel_id,
        }
        assert {name: seen.get(name) for name in expected} == expected
        assert "GP_LAUNCH_SECRETS" not in seen
        kernel.restart()
        assert {**json.loads(kernel.run(SHOW_ENV)), "JPY_PARENT_PID": ""} == {**seen, "JPY_PARENT_PID": ""}


def test_secrets_are_in_no_command_line_and_no_log(installation: Installation, spec: str) -> None:
    with driven(KernelManager(kernel_name=spec)) as kernel:
        key = kernel.manager.session.key.decode()
        kernel.run("1")
        assert not any(key in line for line in installation.processes().values())
        logs = [path for path in installation.home.rglob("*.log") if path.is_file()]
        assert logs
        assert not any(key in path.read_text(errors="replace") for path in logs)


def test_extra_arguments(installation: Installation, ipykernel_spec: Path) -> None:
    installation.jupyter.install_spec("remote", ipykernel_spec)
    arguments = ["--IPKernelApp.exec_lines=extra=41+1"]
    with driven(KernelManager(kernel_name="remote"), extra_arguments=arguments) as kernel:
        assert kernel.run("extra") == "42"
        kernel.restart()
        assert kernel.run("extra") == "42"


def test_many_kernels_of_one_process(installation: Installation, spec: str) -> None:
    async def main() -> list[str]:
        managers = [AsyncKernelManager(kernel_name=spec) for _ in range(5)]
        await asyncio.gather(*(manager.start_kernel() for manager in managers))
        ids = {manager.kernel_id for manager in managers}
        assert len(ids) == 5
        # the last write of a start is not waited for: its file may have another name as yet
        records = [path.stem for path in installation.records() if path.suffix == ".json"]
        assert sorted(ids) == sorted(records)
        await asyncio.gather(*(manager.shutdown_kernel() for manager in managers))
        return records

    assert len(asyncio.run(main())) == 5


def test_unused_manager_costs_nothing(installation: Installation, spec: str) -> None:
    kernel = Driven(KernelManager(kernel_name=spec))
    assert not kernel.alive
    assert not installation.data_dir.exists()
