"""The contract finds what it is for: backends with one fault each, caught by the test meant for it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import pytest

from gp_core import BackendError, State
from gp_core.errors import LaunchFailed, LaunchTimeout
from gp_core.protocol import PORTS
from gp_core.runtime import runtime
from gp_core.testing import BackendContract, FakeBackend, FakeLauncher, FakePlatform, Fault, Installation, StallDetector

pytestmark = [pytest.mark.contract, pytest.mark.timeout(600)]

HEAD = """
import asyncio, contextlib, json, subprocess, sys, time, uuid
import gp_core.kernel
import gp_core.starting
import pytest
from gp_core import BackendError, Finding, State, Status, run_command
from gp_core.testing import BackendContract, FakeBackend, FakePlatform


gp_core.kernel.STOP = gp_core.starting.PATIENCE = 0.5  # seconds; a broken job does not end by waiting


class FakeContract(BackendContract):
    backend_class = FakeBackend
    unknown_job = {"job": "job-0"}
    start_timeout, end_timeout, settle, test_timeout = 2.0, 1.5, 0.05, 15.0

    @pytest.fixture
    def data_dir(self, tmp_path_factory):
        return tmp_path_factory.getbasetemp() / "gp"  # one key for all: making one takes longer than most tests

    @pytest.fixture
    def backend_options(self):
        return {"platform": str(uuid.uuid4())}

    @pytest.fixture
    def break_platform(self, backend_options):
        @contextlib.contextmanager
        def broken():
            platform = FakePlatform.named(backend_options["platform"])
            platform.silent = True
            try:
                yield
            finally:
                platform.silent = False

        return broken
"""

FAULTS = {
    "launch blocks the loop": (
        """
        async def launch(self, request):
            time.sleep(0.15)
            return await super().launch(request)
        """,
        {"test_nothing_blocks_the_event_loop"},
    ),
    "logs block the loop": (
        """
        async def logs(self, handle, *, tail=50):
            subprocess.run(["sleep", "0.15"])
            return await super().logs(handle, tail=tail)
        """,
        {"test_nothing_blocks_the_event_loop"},
    ),
    "launch waits for the kernel": (
        """
        async def launch(self, request):
            handle = await super().launch(request)
            job = self.api.jobs[handle["job"]]
            while job.state is not State.GONE and not (job.launcher and job.launcher.told):
                await asyncio.sleep(0.01)
            return handle
        """,
        {
            "test_launch_does_not_wait_for_the_kernel",
            "test_handle_is_plain_json",
            "test_cancelled_start_leaves_nothing",
        },
    ),
    "the handle is not JSON": (
        """
        async def launch(self, request):
            return {**await super().launch(request), "ports": (1, 2)}
        """,
        {"test_handle_is_plain_json"},
    ),
    "the handle holds the token": (
        """
        async def launch(self, request):
            return {**await super().launch(request), "env": dict(request.secrets)}
        """,
        {"test_secrets_stay_secret"},
    ),
    "argv here holds the secrets": (
        """
        async def launch(self, request):
            await run_command("true", *request.secrets.values())
            return await super().launch(request)
        """,
        {"test_secrets_stay_secret"},
    ),
    "argv over there holds the secrets": (
        """
        async def launch(self, request):
            handle = await super().launch(request)
            await asyncio.sleep(0.02)
            if launcher := self.api.jobs[handle["job"]].launcher:
                launcher.cmdlines.append("env " + str(request.secrets))
            return handle
        """,
        {"test_secrets_stay_secret"},
    ),
    "a log message holds the secrets": (
        """
        async def launch(self, request):
            self.log.debug("launch with %s", dict(request.secrets))
            return await super().launch(request)
        """,
        {"test_secrets_stay_secret"},
    ),
    "a method needs the object that launched": (
        """
        async def launch(self, request):
            handle = await super().launch(request)
            self.mine = {handle["job"]}
            return handle

        async def terminate(self, handle, *, force):
            if handle["job"] in getattr(self, "mine", ()):
                await super().terminate(handle, force=force)
        """,
        {"test_handle_is_all_that_is_needed", "test_discover_finds_what_is_there"},
    ),
    "kernels of one object share their state": (
        """
        async def launch(self, request):
            self.last = await super().launch(request)
            await asyncio.sleep(0.02)
            return self.last
        """,
        {"test_many_kernels_at_once"},
    ),
    "arguments go through a shell": (
        """
        async def launch(self, request):
            import dataclasses
            argv = [word.replace("$HOME", "/root") for word in request.argv]
            return await super().launch(dataclasses.replace(request, argv=argv))
        """,
        {"test_arguments_arrive_as_they_are"},
    ),
    "the working directory is lost": (
        """
        async def launch(self, request):
            import dataclasses
            return await super().launch(dataclasses.replace(request, cwd=None))
        """,
        {"test_kernel_gets_its_working_directory"},
    ),
    "names of jobs are never free again": (
        """
        async def launch(self, request):
            if any(job.kernel_id == request.kernel_id for job in self.api.jobs.values()):
                raise BackendError("409 Conflict")
            return await super().launch(request)
        """,
        {"test_same_kernel_id_can_be_launched_again"},
    ),
    "a job that is submitted late is not terminated": (
        """
        async def launch(self, request):
            name = "late-" + str(uuid.uuid4())
            task = asyncio.get_running_loop().create_task(self.later(name, request))
            self.api.__dict__.setdefault("tasks", []).append(task)
            return {"kernel_id": request.kernel_id, "job": name}

        async def later(self, name, request):
            await asyncio.sleep(0.05)
            job = self.api.submit(request, self.installation)
            del self.api.jobs[job.job_id]
            job.job_id = name
            self.api.jobs[name] = job

        async def status(self, handle):
            status = await super().status(handle)
            known = handle["job"] in self.api.jobs or not handle["job"].startswith("late-")
            return status if known else Status(state=State.PENDING)
        """,
        {"test_cancelled_start_leaves_nothing"},
    ),
    "the kernel's end is not passed on in the log": (
        """
        async def logs(self, handle, *, tail=50):
            return ""
        """,
        {"test_logs_have_the_kernels_output", "test_job_that_dies_is_told_with_its_log"},
    ),
    "tail is not obeyed": (
        """
        async def logs(self, handle, *, tail=50):
            return await super().logs(handle) + "\\nand\\nmore"
        """,
        {"test_logs_have_the_kernels_output"},
    ),
    "logs of a job that is gone are an error": (
        """
        async def logs(self, handle, *, tail=50):
            self.api.jobs[handle["job"]]
            return await super().logs(handle, tail=tail)
        """,
        {"test_logs_of_an_unknown_job_are_empty"},
    ),
    "a dead job is told as running": (
        """
        async def status(self, handle):
            status = await super().status(handle)
            job = self.api.jobs.get(handle["job"])
            failed = job is not None and job.exit_code == 2
            return Status(state=State.RUNNING) if failed else status
        """,
        {"test_job_that_dies_is_told_with_its_log"},
    ),
    "status raises for an unknown job": (
        """
        async def status(self, handle):
            self.api.jobs[handle["job"]]
            return await super().status(handle)
        """,
        {"test_status_of_an_unknown_job_is_gone"},
    ),
    "status says GONE when the platform is silent": (
        """
        async def status(self, handle):
            try:
                return await super().status(handle)
            except BackendError as error:
                return Status(state=State.GONE, detail=str(error))
        """,
        {"test_silent_platform_is_unknown"},
    ),
    "status raises what is no BackendError": (
        """
        async def status(self, handle):
            try:
                return await super().status(handle)
            except BackendError:
                raise ConnectionError("refused") from None
        """,
        {"test_silent_platform_is_unknown"},
    ),
    "status changes something": (
        """
        async def status(self, handle):
            status = await super().status(handle)
            looks = self.api.__dict__.setdefault("looks", [])
            looks.append(handle["job"])
            if looks.count(handle["job"]) == 20:
                await self.api.kill(handle["job"])
            return status
        """,
        {"test_status_only_looks"},
    ),
    "watch never ends": (
        """
        async def watch(self, handle):
            while True:
                yield await self.look(handle)
                await asyncio.sleep(0.01)
        """,
        {"test_watch_follows_a_job_to_its_end"},
    ),
    "watch stops too early": (
        """
        async def watch(self, handle):
            async for status in super().watch(handle):
                if status.state is State.GONE:
                    return
                yield status
        """,
        {"test_watch_follows_a_job_to_its_end", "test_job_that_dies_is_told_with_its_log"},
    ),
    "discover finds nothing": (
        """
        async def discover(self, kernel_id=None):
            return []
        """,
        {"test_discover_finds_what_is_there", "test_same_kernel_id_can_be_launched_again"},
    ),
    "discover finds other kernels too": (
        """
        async def discover(self, kernel_id=None):
            return await super().discover()
        """,
        {"test_discover_finds_what_is_there", "test_terminate_ends_the_job_and_frees_all"},
    ),
    "discover finds kernels of other installations": (
        """
        async def discover(self, kernel_id=None):
            found = [job for job in self.api.jobs.values() if job.state is not State.GONE]
            handles = [{"kernel_id": job.kernel_id, "job": job.job_id} for job in found]
            return [handle for handle in handles if kernel_id in (None, handle["kernel_id"])]
        """,
        {"test_other_installations_are_not_found"},
    ),
    "discover finds what has ended": (
        """
        async def discover(self, kernel_id=None):
            return [
                {"kernel_id": job.kernel_id, "job": job.job_id}
                for job in self.api.jobs.values()
                if job.label == self.installation and kernel_id in (None, job.kernel_id)
            ]
        """,
        {
            "test_terminate_ends_the_job_and_frees_all",
            "test_same_kernel_id_can_be_launched_again",
            "test_missing_command_is_told",
            "test_kernel_that_dies_is_told",
            "test_job_that_dies_is_told_with_its_log",
            "test_cancelled_start_leaves_nothing",
        },
    ),
    "check gives no advice": (
        """
        async def check(self):
            return [Finding(ok=not self.api.silent, subject="fake", text="?")]
        """,
        {"test_check_tells_how_things_are"},
    ),
    "signal goes nowhere": (
        """
        async def signal(self, handle, signum):
            return True
        """,
        {"test_signal_reaches_the_kernel_or_is_declined"},
    ),
    "signal arrives twice": (
        """
        async def signal(self, handle, signum):
            await super().signal(handle, signum)
            return await super().signal(handle, signum)
        """,
        {"test_signal_reaches_the_kernel_or_is_declined"},
    ),
    "signal to a dead job is an error": (
        """
        async def signal(self, handle, signum):
            if self.api.jobs[handle["job"]].state is State.GONE:
                raise BackendError("404 no such job")
            return await super().signal(handle, signum)
        """,
        {"test_signal_to_a_job_that_is_gone_is_harmless"},
    ),
    "terminate does not end the job": (
        """
        async def terminate(self, handle, *, force):
            if force:
                await super().terminate(handle, force=True)
        """,
        {"test_terminate_ends_the_job_and_frees_all"},
    ),
    "terminate ends others too": (
        """
        async def terminate(self, handle, *, force):
            for job in list(self.api.jobs):
                await self.api.kill(job)
        """,
        {"test_terminate_ends_the_job_and_frees_all", "test_discover_finds_what_is_there"},
    ),
    "terminate raises the second time": (
        """
        async def terminate(self, handle, *, force):
            if self.api.jobs[handle["job"]].state is State.GONE:
                raise BackendError("404 no such job")
            await super().terminate(handle, force=force)
        """,
        {"test_terminate_can_be_repeated"},
    ),
    "the platform starts orphans again": (
        """
        async def launch(self, request):
            handle = await super().launch(request)
            job = self.api.jobs[handle["job"]]

            def again(task):
                if job.exit_code == 75:
                    job.exit_code, job.state = None, State.PENDING
                    job.task = asyncio.get_running_loop().create_task(self.api._life(job, request))

            job.task.add_done_callback(again)
            return handle
        """,
        {"test_orphan_ends"},
    ),
}


def class_name(fault: str) -> str:
    return fault.title().replace(" ", "").replace("'", "")


Outcomes = dict[str, dict[str, bool]]
PROCESSES = 4  # that share the faults; they wait far more than they compute


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Run the contract against every broken backend; class -> test -> whether it passed."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "pytest.ini").write_text("[pytest]\n")
    texts = [[HEAD] for _ in range(PROCESSES)]
    texts[0] += ["class TestSound(FakeContract):", "    pass", ""]
    for number, (fault, (body, _)) in enumerate(FAULTS.items()):
        name = class_name(fault)
        texts[number % PROCESSES] += [
            *(f"class {name}(FakeBackend):", textwrap.indent(textwrap.dedent(body), "    ")),
            *(f"class Test{name}(FakeContract):", f"    backend_class = {name}", ""),
        ]
    running = []
    for number, text in enumerate(texts):
        path = folder / f"test_faults_{number}.py"
        path.write_text("\n".join(text))
        options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:asyncio", f"--junitxml={path}.xml"]
        command = [sys.executable, "-m", "pytest", *options, f"--basetemp={folder}/{number}", str(path)]
        running.append(subprocess.Popen(command, cwd=folder))
    for process in running:
        process.wait()
    found: Outcomes = defaultdict(dict)
    for path in folder.glob("*.xml"):
        for case in ElementTree.parse(path).iter("testcase"):
            cls, test = case.attrib["classname"].rpartition(".")[2], case.attrib["name"].partition("[")[0]
            found[cls][test] = found[cls].get(test, True) and len(case) == 0
    return found


def test_sound_backend_passes(passed: Outcomes) -> None:
    tests = {name for name, value in vars(BackendContract).items() if name.startswith("test_") and callable(value)}
    assert passed["TestSound"] == dict.fromkeys(tests, True)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught_by_the_test_meant_for_it(passed: Outcomes, fault: str) -> None:
    outcomes = passed["Test" + class_name(fault)]
    assert len(outcomes) == len(passed["TestSound"])
    assert {test for test, good in outcomes.items() if not good} == FAULTS[fault][1]


# -- the guard


def waiving(reasons: dict[str, str], **overridden: Any) -> type[BackendContract]:
    return type("Lax", (BackendContract,), {"waivers": reasons, **overridden})


def other(self: BackendContract) -> None:
    """Stands in for a test that somebody has made easier."""


@pytest.mark.parametrize("value", [other, None])
def test_overriding_a_test_needs_a_reason(value: object) -> None:
    with pytest.raises(TypeError, match="test_orphan_ends is overridden or removed without a reason"):
        waiving({}, test_orphan_ends=value)
    reason = "our platform ends jobs by itself after a day"
    assert waiving({"test_orphan_ends": reason}, test_orphan_ends=other).test_orphan_ends is other


@pytest.mark.parametrize("reason", ["", "flaky", "no, sorry"])
def test_a_reason_is_a_sentence(reason: str) -> None:
    with pytest.raises(TypeError, match="no reason for test_orphan_ends"):
        waiving({"test_orphan_ends": reason})


def test_a_waiver_names_a_test() -> None:
    with pytest.raises(TypeError, match="waivers names test_orphans_end, which is no test"):
        waiving({"test_orphans_end": "it has another name here"})


@pytest.mark.parametrize("name", ["gp", "_waive", "_nothing_left", "__init_subclass__", "test_the_contract_is_whole"])
def test_the_machinery_is_not_to_be_overridden(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} is "):
        waiving({}, **{name: classmethod(lambda cls, **kwargs: None) if name.startswith("__") else other})


def test_removal_after_the_class_was_made_is_noticed() -> None:
    lax = waiving({})
    lax.test_orphan_ends = other  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        lax().test_the_contract_is_whole()


WAIVED = """
class TestKeepsNoLogs(FakeContract):
    waivers = {"test_logs_have_the_kernels_output": "this platform keeps no output"}

    class backend_class(FakeBackend):
        async def logs(self, handle, *, tail=50):
            return ""

class TestKeepsLogs(FakeContract):
    waivers = {"test_logs_have_the_kernels_output": "this platform keeps no output"}
"""


def test_waived_test_runs_and_its_reason_is_shown(tmp_path: Path) -> None:
    (tmp_path / "test_waived.py").write_text(HEAD + WAIVED)
    tests = [f"test_waived.py::Test{name}::test_logs_have_the_kernels_output" for name in ("KeepsNoLogs", "KeepsLogs")]
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:asyncio", *tests]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 failed, 1 xfailed" in done.stdout, done.stdout
    assert "waived: this platform keeps no output" in done.stdout
    assert "XPASS(strict)" in done.stdout, "a reason that no longer holds"


def test_pytest_is_imported_only_by_those_who_test() -> None:
    code = "import sys, gp_core.testing as t; t.FakeBackend, t.Installation; sys.exit('pytest' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- the stall detector


def stalls_during(work: Callable[[], Any]) -> StallDetector:
    async def step() -> None:
        work()

    with StallDetector.of_runtime() as detector:
        runtime().submit(step()).result(10)
        time.sleep(0.05)
    return detector


def nap() -> None:
    time.sleep(0.25)


def test_stall_is_told_with_the_stack() -> None:
    [stall] = stalls_during(nap).stalls
    assert stall.seconds >= 0.1
    assert "in nap" in stall.stack
    assert "time.sleep(0.25)" in stall.stack


def test_computing_is_a_stall_too() -> None:
    def compute() -> None:
        end = time.thread_time() + 0.3
        while time.thread_time() < end:
            pass

    assert stalls_during(compute).stalls


def test_busy_machine_is_no_stall() -> None:
    """Threads that fight for the interpreter, and many short steps, are not what blocks a loop."""
    stop = threading.Event()

    def burn() -> None:
        while not stop.is_set():
            sum(range(1000))

    async def steps() -> None:
        for _ in range(100):
            time.sleep(0.002)
            await asyncio.sleep(0)

    threads = [threading.Thread(target=burn) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        with StallDetector.of_runtime(0.2) as detector:
            runtime().submit(steps()).result(60)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert detector.stalls == []


# -- the fakes


class TestFakes:
    platform_name: ClassVar[str] = "of-the-kit"

    @pytest.fixture
    def platform(self) -> FakePlatform:
        FakePlatform._all.pop(self.platform_name, None)
        return FakePlatform.named(self.platform_name)

    def run(self, folder: Path, work: Callable[[Installation], Any], timeout: float = 5.0) -> None:
        async def inside() -> None:
            options = {"platform": self.platform_name}
            async with Installation(folder, FakeBackend, options, python=sys.executable, start_timeout=timeout) as gp:
                await work(gp)

        runtime().submit(inside()).result(60)

    @pytest.mark.parametrize(
        ("conduct", "error", "text"),
        [
            ({"exit_code": 9}, LaunchFailed, "exit code 9"),
            ({"listening": False}, LaunchTimeout, "does not listen yet"),
            ({"hello": False}, LaunchTimeout, "CallbackUnreachable"),
            ({"garbage": b"GET / HTTP/1.1\r\n\r\n"}, LaunchTimeout, "CallbackUnreachable"),
            ({"hello_lies": {"token": "guessed"}}, LaunchFailed, "LauncherDied"),
            ({"hello_lies": {"kernel_id": "another"}}, LaunchFailed, "LauncherDied"),
            ({"listening_lies": {"ports": {}}}, LaunchTimeout, "ready"),
        ],
    )
    def test_launcher_misbehaves(
        self, platform: FakePlatform, tmp_path: Path, conduct: dict[str, Any], error: type[Exception], text: str
    ) -> None:
        platform.conduct = FakeLauncher.Conduct(**conduct)

        async def work(gp: Installation) -> None:
            with pytest.raises(error, match=text):
                await gp.start()

        self.run(tmp_path, work, timeout=0.5)

    def test_ports_of_a_kernel_that_lead_nowhere_are_told(self, platform: FakePlatform, tmp_path: Path) -> None:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))  # and does not listen
            port = nobody.getsockname()[1]
            platform.conduct = FakeLauncher.Conduct(listening_lies={"ports": dict.fromkeys(PORTS, port)})

            async def work(gp: Installation) -> None:
                gp.channels = "direct"
                with pytest.raises(LaunchFailed, match=f"127.0.0.1 port {port}.*refused.*KernelUnreachable"):
                    await gp.start()
                assert await gp.backend().discover() == []

            self.run(tmp_path, work)

    def test_faults_of_the_platform(self, platform: FakePlatform, tmp_path: Path) -> None:
        async def work(gp: Installation) -> None:
            started = await gp.start()
            handle, backend = started.handle, gp.backend()
            platform.faults = [Fault("logs", error=BackendError("503"), on={platform.calls.get("logs", 0) + 2})]
            await backend.logs(handle)
            with pytest.raises(BackendError, match="503"):
                await backend.logs(handle)
            await backend.logs(handle)
            platform.faults = [Fault("status", answer=State.PENDING)]
            assert (await backend.status(handle)).state is State.PENDING
            platform.faults = [Fault("discover", delay=0.1)]
            before = time.monotonic()
            assert await backend.discover(started.kernel_id) == [handle]
            assert time.monotonic() - before >= 0.1
            platform.faults.clear()
            await platform.lose(handle["job"])
            assert (await backend.status(handle)).state is State.GONE

        self.run(tmp_path, work)

    def test_submitted_job_whose_answer_is_lost_is_found_and_removed(
        self, platform: FakePlatform, tmp_path: Path
    ) -> None:
        platform.faults = [Fault("submit", error=BackendError("the connection broke"), lose=True)]

        async def work(gp: Installation) -> None:
            with pytest.raises(BackendError, match="the connection broke"):
                await gp.start()
            assert await gp.backend().discover() == []
            assert len(platform.jobs) == 1

        self.run(tmp_path, work)
