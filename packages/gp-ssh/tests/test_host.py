"""What is asked of a host, with this machine's shell and Python in the place of the host's."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from gp_core import BackendError, Host, LaunchRequest
from gp_core.runtime import runtime
from gp_ssh import far
from gp_ssh import host as host_module
from gp_ssh.backend import SshBackend
from gp_ssh.connection import COMMAND, Answer, ConnectionFailed
from gp_ssh.host import RemoteHost, known
from gp_ssh.hosts import Entry, Target, entries

SLEEPER = b"import sys, time\nprint('got', len(sys.stdin.read()), sys.argv[2:], flush=True)\ntime.sleep(60)\n"
ASKED = LaunchRequest(
    kernel_id="k1",
    kernel_name="python3",
    user="ana",
    backend="ssh",
    argv=[],
    launcher_options=["a b", "$(id)"],
    secrets={"GP_LAUNCH_SECRETS": "s" * 100_000},
)
LOG = {"installation": "i1", "kernel_id": "k1", "tail": 5}


class Here:
    """A line that leads to this machine, with a home of its own, by a login shell that talks too much."""

    def __init__(self, home: Path, shell: str = "/bin/sh") -> None:
        self.target = Target("here", "localhost", 22, "me")
        self.questions = 0
        self._env = {"HOME": str(home), "PATH": os.environ["PATH"]}
        self._shell = shell

    async def run(self, line: str, data: bytes = b"", *, timeout: float = 20.0) -> Answer:
        self.questions += 1

        def done() -> Answer:
            argv = [self._shell, "-c", f"echo 'Welcome! {{}}'; {COMMAND}"]
            ran = subprocess.run(
                argv,
                input=line.encode() + b"\n" + data,
                env=self._env,
                capture_output=True,
                timeout=timeout,
                check=False,
            )
            return Answer(ran.returncode, ran.stdout, ran.stderr)

        return await asyncio.to_thread(done)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    made = tmp_path / 'it\'s a "home" $HOME'
    made.mkdir()
    return made


@pytest.fixture
def request_(tmp_path: Path) -> LaunchRequest:
    """For a launcher that only sleeps."""
    (tmp_path / "launcher.pyz").write_bytes(SLEEPER)
    return replace(ASKED, launcher_file=tmp_path / "launcher.pyz")


def shells() -> list[str]:
    return [path for name in ("sh", "bash", "dash", "zsh", "fish", "tcsh") if (path := shutil.which(name))]


@pytest.mark.parametrize("shell", shells())
def test_whatever_the_login_shell_is_the_first_visit_finds_a_python(home: Path, shell: str) -> None:
    facts = runtime().submit(RemoteHost(Here(home, shell)).visit()).result(30)  # type: ignore[arg-type]
    assert facts.version >= (3, 8)
    assert facts.home == str(home)
    assert facts.free > 0


def test_a_launcher_is_started_looked_at_and_ended(home: Path, request_: LaunchRequest) -> None:
    async def life() -> None:
        line: Any = Here(home)
        host = RemoteHost(line, sys.executable)
        note = await host.start(request_, [], "i1")
        asked = line.questions
        assert await asyncio.gather(*(host.runs(note) for _ in range(50))) == [True] * 50
        assert line.questions == asked + 1, "all at once"
        found = await host.ask("discover", {"installation": "i1"})
        assert found == {"notes": [note]}
        assert await host.ask("discover", {"installation": "i2"}) == {"notes": []}
        reused = {**note, "started": note["started"] - 1}
        assert not await host.runs(reused), "another process has the number now"
        await host.ask("kill", {"note": reused, "signal": int(signal.SIGKILL)})
        assert await host.runs(note)
        deadline = time.monotonic() + 10
        while not (said := (await host.ask("logs", LOG))["text"]):
            assert time.monotonic() < deadline
        assert said == "got 100000 ['a b', '$(id)', '--']\n"
        await host.ask("kill", {"note": note, "signal": int(signal.SIGKILL)})
        while await host.runs(note):
            assert time.monotonic() < deadline
        assert await host.ask("discover", {"installation": "i1"}) == {"notes": []}
        files = [path for path in home.rglob("*") if path.is_file()]
        assert all(path.stat().st_mode & 0o077 == 0 for path in files)
        assert not any("sss" in path.read_text(errors="replace") for path in files), "secrets are in no file"

    runtime().submit(life()).result(60)


def test_a_launcher_that_ended_at_once_does_not_run(home: Path) -> None:
    async def ask() -> None:
        host = RemoteHost(Here(home), sys.executable)  # type: ignore[arg-type]
        note = {"kernel_id": "k1", "pid": 2**22 + 1, "started": None, "boot": far.boot_id(), "host": "h", "ours": True}
        assert not await host.runs(note)
        assert (await host.ask("kill", {"note": note, "signal": int(signal.SIGTERM)}))["gone"]

    runtime().submit(ask()).result(30)


def test_starts_that_come_together_ask_once_whether_a_host_can_dial(home: Path) -> None:
    async def ask() -> None:
        line: Any = Here(home)
        host = RemoteHost(line, sys.executable)
        nowhere = [("127.0.0.1", 1), ("127.0.0.1", 2)]
        assert await asyncio.gather(*(host.reaches(nowhere) for _ in range(20))) == [False] * 20
        assert line.questions == 2, "with the first visit"

    runtime().submit(ask()).result(30)


def test_many_questions_travel_together_and_one_error_is_one_answer(home: Path) -> None:
    async def life() -> None:
        line: Any = Here(home)
        host = RemoteHost(line, sys.executable)
        await host.visit()
        asked = line.questions
        good = [host.ask("logs", {**LOG, "kernel_id": f"k{number}"}) for number in range(40)]
        *texts, error = await asyncio.gather(*good, host.ask("logs", {}), return_exceptions=True)
        assert texts == [{"text": ""}] * 40
        assert "KeyError" in str(error)
        assert line.questions - asked <= 6

    runtime().submit(life()).result(60)


def test_notes_from_before_a_reboot_go_and_those_of_other_hosts_stay(home: Path, request_: LaunchRequest) -> None:
    async def life() -> None:
        line: Any = Here(home)
        host = RemoteHost(line, sys.executable)
        note = await host.start(request_, [], "i1")
        await host.ask("kill", {"note": note, "signal": int(signal.SIGKILL)})
        folder = home / ".cache/gp/kernels/i1"
        for name, changes in {"old": {"boot": "another"}, "elsewhere": {"boot": "another", "host": "h9"}}.items():
            (folder / f"{name}.json").write_text(json.dumps({**note, "kernel_id": name, **changes}))
        while await host.runs(note):
            await asyncio.sleep(0.05)
        assert await host.ask("discover", {"installation": "i1"}) == {"notes": []}
        assert [path.name for path in folder.iterdir()] == ["elsewhere.json"]

    runtime().submit(life()).result(60)


def test_a_launcher_that_somebody_has_removed_is_brought_again(home: Path, request_: LaunchRequest) -> None:
    async def twice() -> None:
        host = RemoteHost(Here(home), sys.executable)  # type: ignore[arg-type]
        for kernel_id in ("k1", "k2"):
            note = await host.start(replace(request_, kernel_id=kernel_id), [], "i1")
            await host.ask("kill", {"note": note, "signal": int(signal.SIGKILL)})
            shutil.rmtree(home / ".cache" / "gp" / "launchers")

    runtime().submit(twice()).result(60)


OTHERS = (
    "import os, subprocess, sys, time; subprocess.Popen(['sleep', '60']);"
    "print(os.environ['COLOUR'], os.environ['TOKEN'], os.getcwd(), sys.stdin.read(), flush=True); time.sleep(60)"
)


def test_a_command_that_starts_a_launcher_itself_ends_with_its_children(home: Path, tmp_path: Path) -> None:
    async def life() -> None:
        host = RemoteHost(Here(home), sys.executable)  # type: ignore[arg-type]
        request = replace(ASKED, wrapped=False, env={"COLOUR": "${HOME}-$$red"}, secrets={"TOKEN": "t"}, cwd="/none")
        note = await host.start(request, [sys.executable, "-c", OTHERS], "i1")
        deadline = time.monotonic() + 10
        while not (said := (await host.ask("logs", LOG))["text"]):
            assert time.monotonic() < deadline
        assert said == f"{home}-$red t {home} \n"
        group = psutil.Process(note["pid"]).children()
        assert len(group) == 1
        os.kill(note["pid"], signal.SIGKILL)
        while await host.runs(note):
            assert time.monotonic() < deadline
        await host.ask("kill", {"note": note, "signal": int(signal.SIGKILL)})
        psutil.wait_procs(group, 10)
        assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in group)
        await host.ask("kill", {"note": note, "signal": int(signal.SIGKILL)})  # nobody is there

    runtime().submit(life()).result(60)


def test_a_host_without_python_says_what_it_has(home: Path, tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\necho 3.6.8\nexit 1\n")
    old.chmod(0o755)
    with pytest.raises(ConnectionFailed, match=r"no Python .*; found: \S+python-old 3\.6\.8 \[NoPython\]"):
        runtime().submit(RemoteHost(Here(home), str(old)).visit()).result(30)  # type: ignore[arg-type]


def test_a_home_that_cannot_be_written_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".cache").write_text("a file")
    with pytest.raises(BackendError, match=r"here: .*Error.*\[HostFailed\]"):
        runtime().submit(RemoteHost(Here(home), sys.executable).visit()).result(30)  # type: ignore[arg-type]


def test_a_command_that_says_nothing_is_an_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "_search", lambda candidates: "echo 'no such thing' >&2; exit 3")
    with pytest.raises(BackendError, match=r"here gave no answer \(exit code 3\): no such thing"):
        runtime().submit(RemoteHost(Here(home)).visit()).result(30)  # type: ignore[arg-type]


def test_the_load_of_a_host_is_asked_for_now_and_then(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> None:
        line: Any = Here(home)
        host = RemoteHost(line, sys.executable)
        await host.visit()
        asked = line.questions
        first = await asyncio.gather(*(host.load() for _ in range(20)))
        assert len(set(first)) == 1
        assert 0 < first[0] < 1000
        assert line.questions == asked + 1
        monkeypatch.setattr(host_module, "LOAD_HOLDS", 0.0)
        monkeypatch.setattr(host_module, "LOAD_WITHIN", 0.001)
        assert await host.load() == math.inf, "it does not answer soon"

    runtime().submit(life()).result(60)


def test_the_gpu_that_is_least_busy_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '90, 1000, 80000'\necho '5, 40000, 80000'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert far.load({}, b"")["gpu"] == 0.5
    tool.write_text("#!/bin/sh\necho 'No devices were found'\n")
    assert "gpu" not in far.load({}, b"")


def test_the_host_with_the_least_load_gets_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = SshBackend(remote_hosts=["h1", "h2", "h3"], load_balancing_algorithm="least-load")
    loads = {"h1": 0.9, "h2": 0.1, "h3": math.inf}

    class Loaded:
        def __init__(self, entry: Entry) -> None:
            self._name = entry.text

        async def load(self) -> float:
            return loads[self._name]

    async def host(self: SshBackend, entry: Entry, user: str) -> Loaded:
        return Loaded(entry)

    monkeypatch.setattr(SshBackend, "_host", host)
    request = LaunchRequest(kernel_id="k1", kernel_name="python3", user="me", backend="ssh", argv=["x"])
    chosen = runtime().submit(backend._chosen(entries(backend.remote_hosts, {}), request)).result(10)
    assert chosen.text == "h2"


def test_kernels_that_were_taken_over_count() -> None:
    backend = SshBackend(remote_hosts=["t1", "t2"], load_balancing_algorithm="least-connection")
    for number in range(3):
        handle = {"kernel_id": f"taken{number}", "host": "t1", "note": {}}
        runtime().submit(backend.adopt(handle, ("127.0.0.1", 1))).result(10)
    try:
        counts = {host.name: host.kernels for host in known().ledger.usable([Host("t1"), Host("t2")], 0)}
        assert counts == {"t1": 3, "t2": 0}
    finally:
        for number in range(3):
            known().ledger.ended(f"taken{number}")
