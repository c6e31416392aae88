"""`BackendContract`: what every backend must do, as a pytest class to inherit.

A test module of a backend is::

    from gp_core.testing import BackendContract

    class TestMine(BackendContract):
        backend_class = MyBackend
        unknown_job = {"job_id": "99999999"}
        waivers = {"test_logs_have_the_kernels_output": "the platform keeps no output"}

        @pytest.fixture
        def backend_options(self): return {"partition": "debug"}

Kernels are started as in earnest: the core makes the request, the backend starts the launcher, that calls back to a
listener of the test's own. Only the kernel is a tiny one, which needs nothing but a Python over there.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import json
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, ParamSpec

import pytest

from ..backend import Backend, Finding, Handle, State, Status
from ..errors import BackendError, LaunchFailed, LaunchTimeout
from ..runtime import runtime
from . import tiny_kernel
from .harness import Installation, Started, eventually
from .stalls import StallDetector

P = ParamSpec("P")

SETTINGS = frozenset(
    {
        "backend_class", "backend_options", "break_platform", "channels", "data_dir", "end_timeout", "python",
        "settle", "start_timeout", "test_timeout", "unknown_job", "waivers",
    }
)  # fmt: skip
"""What a subclass fills in; everything else of the contract is not its business."""

AWKWARD = [
    "",
    "two words",
    "it's",
    'say "hi"',
    "$HOME `id` $(id)",
    "back\\slash",
    "a\nb",
    "*",
    "-x",
    "--k=v;w",
    "é✓",
    "{x}",
]


def on_runtime(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test where backends run, and not for longer than the contract's ``test_timeout``."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        limit: float = args[0].test_timeout  # type: ignore[attr-defined]

        async def limited() -> None:
            try:
                await asyncio.wait_for(test(*args, **kwargs), limit)
            except asyncio.TimeoutError as error:
                raise AssertionError(str(error) or f"the test did not end within {limit:g} s") from error

        runtime().submit(limited()).result(limit + 60)

    return run


class BackendContract:
    """What every backend must do. Inherit it, fill in what `SETTINGS` names, and nothing else.

    No test may be overridden or removed, and none left out, but with a reason in ``waivers``: a waived test still runs
    and is expected to fail (so that a reason that no longer holds is noticed); an overridden one runs in its new form.
    """

    backend_class: ClassVar[type[Backend]]  #: the backend
    unknown_job: ClassVar[Mapping[str, Any] | None] = (
        None  #: values that turn a handle into that of a job that never was
    )
    python: ClassVar[str] = sys.executable  #: a Python >= 3.8 of the far side, to run the tiny kernel
    channels: ClassVar[str] = "relay"  #: or "direct": how the tests reach kernels
    start_timeout: ClassVar[float] = 60.0  #: seconds for a kernel to listen
    end_timeout: ClassVar[float] = 30.0  #: seconds for a job to be gone
    settle: ClassVar[float] = 1.0  #: seconds in which what should not happen would have happened
    test_timeout: ClassVar[float] = 300.0  #: seconds for one test
    waivers: ClassVar[Mapping[str, str]] = {}  #: name of a test -> why it is overridden or cannot pass

    @pytest.fixture
    def backend_options(self) -> Mapping[str, Any]:
        """Options of the backend, as in the ``config`` of a kernel.json."""
        return {}

    @pytest.fixture
    def data_dir(self, tmp_path: Path) -> Path:
        """An empty folder for key, records and launcher; on a shared file system if the far side reads it there."""
        return tmp_path / "gp"

    @pytest.fixture
    def break_platform(self) -> Callable[[], AbstractContextManager[object]] | None:
        """Returns a context manager that makes the platform's interface unreachable; its jobs live on."""
        return None

    # -- the guard

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if problems := list(_violations(cls)):
            raise TypeError(f"{cls.__name__} does not keep the contract: " + "; ".join(problems))

    @pytest.fixture(autouse=True)
    def _waive(self, request: pytest.FixtureRequest) -> None:
        name = getattr(request.node, "originalname", request.node.name)
        if name in self.waivers and getattr(type(self), name) is getattr(BackendContract, name):
            request.applymarker(pytest.mark.xfail(reason=f"waived: {self.waivers[name]}", strict=True))

    @pytest.fixture
    def gp(self, data_dir: Path, backend_options: Mapping[str, Any]) -> Iterator[Installation]:
        """An installation with this backend and nothing else."""

        async def made() -> Installation:
            made = Installation(
                data_dir,
                self.backend_class,
                backend_options,
                python=self.python,
                start_timeout=self.start_timeout,
                channels=self.channels,
            )
            return await made.__aenter__()

        installation = runtime().submit(made()).result(60)
        yield installation
        runtime().submit(installation.__aexit__()).result(300)

    def test_the_contract_is_whole(self) -> None:
        """Tests that were removed or replaced after the class was made are noticed too."""
        assert not list(_violations(type(self)))

    # -- launch

    @on_runtime
    async def test_launch_does_not_wait_for_the_kernel(self, gp: Installation) -> None:
        """`launch` returns as soon as there is a handle: the core waits, hears both launcher and platform, and can
        be cancelled; a launch that waits by itself can do none of that."""
        async with gp.starting(gp.request("never")) as (kernel, task):
            got = await eventually(lambda: kernel.record.handle is not None or task.done(), self.start_timeout)
            assert not task.done(), f"the start ended though its kernel never listens: {task}"
            assert got, f"launch() did not return within {self.start_timeout:g} s; this kernel never listens"

    @on_runtime
    async def test_handle_is_plain_json(self, gp: Installation) -> None:
        """The core writes the handle into its store, and another process reads it: JSON, nothing else, and small."""
        async with gp.starting(gp.request("never")) as (kernel, task):
            await eventually(lambda: kernel.record.handle is not None or task.done(), self.start_timeout)
            handle = kernel.record.handle
        assert isinstance(handle, dict), f"launch() returned no dict: {handle!r}; the start: {task}"
        text = _dumped(handle)
        assert json.loads(text) == handle, f"it is another one after a trip through JSON: {handle!r}"
        assert len(text) < 16 * 1024, f"a handle of {len(text)} bytes"

    @on_runtime
    async def test_handle_is_all_that_is_needed(self, gp: Installation) -> None:
        """Another process - a server that takes the kernel over, `jupyter gp stop` - has only handle and options: no
        method may depend on what an object remembers of its launch."""
        started = await gp.start()
        other = gp.backend()
        assert (await other.status(started.handle)).state is State.RUNNING
        assert isinstance(await other.signal(started.handle, signal.SIGINT), bool)
        assert isinstance(await other.logs(started.handle), str)
        await gp.backend().terminate(started.handle, force=True)
        await gp.gone(started.handle, self.end_timeout)

    @on_runtime
    async def test_kernel_gets_its_environment_and_can_be_reached(self, gp: Installation) -> None:
        """The kernel is the one that was asked for, its variables arrive, and clients reach it both through its
        launcher and directly, at the host that the backend tells."""
        for gp.channels in ("relay", "direct"):
            started = await gp.start(gp.request(env={"GP_CONTRACT": 'it\'s $$HOME, "é"\n=;\\'}))
            seen = await started.ask()
            assert seen["env"].get("KERNEL_ID") == started.kernel_id
            assert seen["env"].get("KERNEL_USERNAME") == "tester"
            assert seen["env"].get("GP_CONTRACT") == 'it\'s $HOME, "é"\n=;\\'

    @on_runtime
    async def test_kernel_gets_its_working_directory(self, gp: Installation) -> None:
        """``cwd`` is where the kernel runs, if that folder exists there; "/" exists everywhere."""
        started = await gp.start(gp.request(cwd="/"))
        assert (await started.ask())["cwd"] == "/"

    @on_runtime
    async def test_arguments_arrive_as_they_are(self, gp: Installation) -> None:
        """No shell, template or submit tool on the way may touch what the kernelspec's argv says."""
        started = await gp.start(gp.request(words=AWKWARD))
        assert (await started.ask())["words"] == AWKWARD

    @on_runtime
    async def test_secrets_stay_secret(self, gp: Installation, caplog: pytest.LogCaptureFixture) -> None:
        """The launch token and the kernel's key travel to the launcher and nowhere else: not into argv (``ps`` shows
        it to everybody) here or there, the handle, a status, a log, or the kernel's environment."""
        caplog.set_level(logging.DEBUG)
        caplog.set_level(logging.DEBUG, logger="traitlets")
        with _commands() as commands:
            started = await gp.start()
            seen = await started.ask()
            backend, handle = started.backend, started.handle
            places = {
                "the handle": json.dumps(handle),
                "a status": str(await backend.status(handle)),
                "the job's log": await backend.logs(handle, tail=10000),
                "what discover() finds": repr(await backend.discover()),
                "the kernel's environment": repr(seen["env"]),
                "the kernel's argv": repr(seen["words"]),
                "the command line of a process over there": repr(seen["cmdlines"]),
            }
            await backend.terminate(handle, force=True)
        places["the command line of a process that was started here"] = repr(commands)
        places["a log message"] = caplog.text
        for place, text in places.items():
            for secret in started.secrets:
                assert secret not in text, f"a secret is in {place}"

    @on_runtime
    async def test_same_kernel_id_can_be_launched_again(self, gp: Installation) -> None:
        """A restart whose launcher is gone is a full launch with the same kernel id, right after the old job's end."""
        first = await gp.start()
        await first.kernel.remove()
        again = await gp.start(gp.request(kernel_id=first.kernel_id))
        assert (await again.ask())["env"]["KERNEL_ID"] == first.kernel_id
        assert [handle["kernel_id"] for handle in await again.backend.discover(first.kernel_id)] == [first.kernel_id]

    @on_runtime
    async def test_many_kernels_at_once(self, gp: Installation) -> None:
        """Ten launches at the same moment through one object give ten kernels, each with its own handle."""
        requests = [gp.request() for _ in range(10)]
        kernels = [gp.kernel(request) for request in requests]
        shared = kernels[0].backend
        for kernel in kernels:
            kernel.backend = shared
        await asyncio.gather(
            *(kernel.launch(gp.plan(request)) for kernel, request in zip(kernels, requests, strict=True))
        )
        started = [Started(kernel, shared, gp.requests[kernel.info.kernel_id]) for kernel in kernels]
        assert len({json.dumps(one.handle, sort_keys=True) for one in started}) == 10, "kernels share a handle"
        for one in started:
            assert (await one.ask())["env"]["KERNEL_ID"] == one.kernel_id
        statuses = await asyncio.gather(*(shared.status(one.handle) for one in started))
        assert [status.state for status in statuses] == [State.RUNNING] * 10
        await asyncio.gather(*(kernel.remove() for kernel in kernels))
        await asyncio.gather(*(gp.gone(one.handle, self.end_timeout) for one in started))

    # -- starts that fail

    @on_runtime
    async def test_missing_command_is_told(self, gp: Installation) -> None:
        """A command that is not installed over there is an error with that reason, long before the timeout."""
        request = gp.request(argv=["/no/such/program", "{connection_file}"])
        error = await _failure(gp, request)
        assert error.failure.code == "CommandNotFound", f"{error}"
        await self._nothing_left(gp, request.kernel_id)

    @on_runtime
    async def test_kernel_that_dies_is_told(self, gp: Installation) -> None:
        """The commonest failure of all, a kernel that ends while it starts: its exit code and last words are told."""
        request = gp.request("exit:7")
        error = await _failure(gp, request)
        assert error.exit_code == 7
        assert tiny_kernel.LAST_WORDS in str(error)
        await self._nothing_left(gp, request.kernel_id)

    @on_runtime
    async def test_job_that_dies_is_told_with_its_log(self, gp: Installation) -> None:
        """A job that ends before its launcher could call anybody - a Python too old, a full disk - is noticed by the
        platform's word and not by the clock, and its output, which alone says why, is in the error."""
        request = gp.request(more_options=["--no-such-option=1"])
        error = await _failure(gp, request)
        assert "no-such-option" in str(error), f"the job's output is not in the error: {error}"
        await self._nothing_left(gp, request.kernel_id)

    @pytest.mark.parametrize("moment", ["at once", "while it is launched", "when it is launched"])
    @on_runtime
    async def test_cancelled_start_leaves_nothing(self, gp: Installation, moment: str) -> None:
        """A user who closes the browser cancels the start: whatever the backend had begun is removed."""
        request = gp.request("never")
        async with gp.starting(request) as (kernel, task):
            if moment == "while it is launched":
                await eventually(lambda: kernel.info.kernel_id in gp.requests or task.done(), self.start_timeout)
            elif moment == "when it is launched":
                await eventually(lambda: kernel.record.handle is not None or task.done(), self.start_timeout)
            assert not task.done(), f"the start ended before it could be cancelled: {task}"
        await self._nothing_left(gp, request.kernel_id)

    # -- looking

    @on_runtime
    async def test_status_only_looks(self, gp: Installation) -> None:
        """`status` is called at any time by anybody: it says RUNNING for a kernel that runs, and changes nothing."""
        started = await gp.start()
        before = await started.backend.discover(started.kernel_id)
        statuses = [await started.backend.status(started.handle) for _ in range(20)]
        assert [status.state for status in statuses] == [State.RUNNING] * 20
        assert all(isinstance(status, Status) for status in statuses)
        assert await started.backend.discover(started.kernel_id) == before
        assert await started.answers()

    @on_runtime
    async def test_status_of_an_unknown_job_is_gone(self, gp: Installation) -> None:
        """Platforms forget: a job that they do not know (any more) is GONE, not an error, or it would live for ever."""
        assert self.unknown_job, "fill in unknown_job: values that turn a handle into that of a job that never was"
        started = await gp.start()
        stranger = {**started.handle, **self.unknown_job}
        assert (await gp.backend().status(stranger)).state is State.GONE
        await started.backend.terminate(started.handle, force=True)
        await gp.gone(started.handle, self.end_timeout)
        for _ in range(3):
            assert (await started.backend.status(started.handle)).state is State.GONE

    @on_runtime
    async def test_silent_platform_is_unknown(
        self, gp: Installation, break_platform: Callable[[], AbstractContextManager[object]] | None
    ) -> None:
        """An interface that does not answer says nothing about the kernel: UNKNOWN or `BackendError`, never GONE,
        because GONE ends the kernel. When it answers again the kernel is still there."""
        assert break_platform is not None, "fill in the fixture break_platform, or waive this test with a reason"
        started = await gp.start()
        broken = break_platform()
        await runtime().blocking(broken.__enter__)
        try:
            status = await self._look(started)
            assert status.state is State.UNKNOWN, f"the platform is silent, and status() says {status}"
            assert status.detail, "nobody is told what is wrong with the platform"
            seen = [await anext(watch) for watch in [started.backend.watch(started.handle)]]
            assert seen[0].state is State.UNKNOWN
            assert await started.answers(), "break_platform ended the kernel itself"
        finally:
            await runtime().blocking(broken.__exit__, None, None, None)

        async def runs_again() -> bool:
            return (await started.backend.look(started.handle)).state is State.RUNNING

        assert await eventually(runs_again, self.end_timeout, every=0.2)

    async def _look(self, started: Started) -> Status:
        try:
            return await started.backend.status(started.handle)
        except BackendError:  # the way in which a backend says it; any other exception is a bug that look() would hide
            return await started.backend.look(started.handle)

    @on_runtime
    async def test_watch_follows_a_job_to_its_end(self, gp: Installation) -> None:
        """`watch` tells RUNNING, then GONE when the job ends, and then it ends itself."""
        started = await gp.start()
        seen: list[State] = []

        async def follow() -> None:
            async for status in started.backend.watch(started.handle):
                seen.append(status.state)

        following = asyncio.ensure_future(follow())
        try:
            assert await eventually(lambda: State.RUNNING in seen, self.end_timeout), f"watch() told {seen}"
            assert State.GONE not in seen
            await started.backend.terminate(started.handle, force=True)
            done, _ = await asyncio.wait({following}, timeout=self.end_timeout)
            assert done, f"watch() did not end within {self.end_timeout:g} s of the job's end; it told {set(seen)}"
            following.result()
            assert seen[-1] is State.GONE
            assert seen.count(State.GONE) == 1
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    @on_runtime
    async def test_logs_have_the_kernels_output(self, gp: Installation) -> None:
        """`logs` has what the kernel wrote: it is attached to failures and is what `jupyter gp logs` shows."""
        started = await gp.start()

        async def written() -> bool:
            return tiny_kernel.HELLO in await started.backend.logs(started.handle)

        assert await eventually(written, self.end_timeout, every=0.1), await started.backend.logs(started.handle)
        assert len((await started.backend.logs(started.handle, tail=1)).splitlines()) <= 1, "tail is not obeyed"

    @on_runtime
    async def test_logs_of_an_unknown_job_are_empty(self, gp: Installation) -> None:
        """`logs` decorates an error that is on its way: it must not be one itself when the job is gone."""
        started = await gp.start()
        await started.backend.terminate(started.handle, force=True)
        await gp.gone(started.handle, self.end_timeout)
        assert isinstance(await started.backend.logs({**started.handle, **(self.unknown_job or {})}), str)

    @on_runtime
    async def test_discover_finds_what_is_there(self, gp: Installation) -> None:
        """`discover` finds one kernel by its id, all of them without, and none that is not there: `ps`, `gc`, script
        launches and the clean-up after a half-failed launch live by it. What it finds can be used as a handle."""
        one, two = await asyncio.gather(gp.start(), gp.start())
        backend = gp.backend()
        assert [handle["kernel_id"] for handle in await backend.discover(one.kernel_id)] == [one.kernel_id]
        found = [handle.get("kernel_id") for handle in await backend.discover()]
        assert {one.kernel_id, two.kernel_id} <= set(found)
        assert len(found) == len(set(found)), f"found twice: {found}"
        assert await backend.discover(str(uuid.uuid4())) == [], "found for an id that no kernel has"
        [handle] = await backend.discover(two.kernel_id)
        assert json.loads(_dumped(handle)) == handle
        assert (await backend.status(handle)).state is State.RUNNING
        await backend.terminate(handle, force=True)
        await gp.gone(two.handle, self.end_timeout)
        assert await one.answers()

    @on_runtime
    async def test_other_installations_are_not_found(self, gp: Installation) -> None:
        """Two servers may share a platform, and each one's ``gc`` must leave the other's kernels alone: jobs carry
        `Backend.installation`, and `discover` finds those of its own only."""
        await gp.start()
        with gp.as_another():
            assert await gp.backend().discover() == []

    @on_runtime
    async def test_check_tells_how_things_are(
        self, gp: Installation, break_platform: Callable[[], AbstractContextManager[object]] | None
    ) -> None:
        """`check` finds nothing wrong while all is well; what it finds wrong comes with what to do about it."""
        findings = await gp.backend().check()
        assert all(isinstance(finding, Finding) for finding in findings)
        assert [finding for finding in findings if not finding.ok] == []
        if findings and break_platform is not None:
            broken = break_platform()
            await runtime().blocking(broken.__enter__)
            try:
                wrong = [finding for finding in await gp.backend().check() if not finding.ok]
            finally:
                await runtime().blocking(broken.__exit__, None, None, None)
            assert wrong, "the platform is broken, and check() finds nothing wrong"
            assert all(finding.advice for finding in wrong), f"no advice: {wrong}"

    # -- signals and the end

    @on_runtime
    async def test_signal_reaches_the_kernel_or_is_declined(self, gp: Installation) -> None:
        """`signal` is the way when the launcher's session is lost: True means that the kernel gets it - once, and
        nobody else dies of it -, False that the platform cannot."""
        started = await gp.start()
        sent = await started.backend.signal(started.handle, signal.SIGINT)
        assert type(sent) is bool

        async def arrived() -> bool:
            return bool((await started.ask())["signals"])

        if sent:
            assert await eventually(arrived, self.end_timeout, every=min(0.1, self.settle)), (
                "told as sent, but it did not arrive"
            )
        await asyncio.sleep(self.settle)
        assert (await started.ask())["signals"] == [int(signal.SIGINT)] * sent
        assert (await started.backend.status(started.handle)).state is State.RUNNING

    @on_runtime
    async def test_signal_to_a_job_that_is_gone_is_harmless(self, gp: Installation) -> None:
        """Ends and signals cross: a signal to a job that is gone is False or True, and no error."""
        started = await gp.start()
        await started.backend.terminate(started.handle, force=True)
        await gp.gone(started.handle, self.end_timeout)
        assert type(await started.backend.signal(started.handle, signal.SIGINT)) is bool

    @pytest.mark.parametrize("force", [False, True])
    @on_runtime
    async def test_terminate_ends_the_job_and_frees_all(self, gp: Installation, force: bool) -> None:
        """After `terminate` job and kernel are gone, soon; other kernels are not."""
        started, other = await asyncio.gather(gp.start(), gp.start())
        await started.backend.terminate(started.handle, force=force)
        await gp.gone(started.handle, self.end_timeout)
        assert not await started.answers(), "the job is gone and its kernel answers"
        assert await started.backend.discover(started.kernel_id) == []
        assert await other.answers(), "another kernel ended too"
        assert (await other.backend.status(other.handle)).state is State.RUNNING

    @pytest.mark.parametrize("force", [False, True])
    @on_runtime
    async def test_terminate_can_be_repeated(self, gp: Installation, force: bool) -> None:
        """Shutdown, clean-up and the janitor may all terminate the same job: again, at the same time, when it is gone,
        and when it never was, all is harmless."""
        started = await gp.start()
        await asyncio.gather(*(started.backend.terminate(started.handle, force=force) for _ in range(3)))
        await started.backend.terminate(started.handle, force=not force)
        await gp.gone(started.handle, self.end_timeout)
        await started.backend.terminate(started.handle, force=force)
        await gp.backend().terminate({**started.handle, **(self.unknown_job or {})}, force=force)

    @on_runtime
    async def test_orphan_ends(self, gp: Installation) -> None:
        """A launcher that has lost its server for longer than its lease ends the kernel and itself, and the job with
        it: the backend must start it so that this is possible (no restart policy, no requeue)."""
        lease = min(1.0, self.end_timeout / 4)
        started = await gp.start(orphan_timeout=lease)
        gp.disappear()
        await gp.gone(started.handle, lease + self.end_timeout)
        await asyncio.sleep(self.settle)
        assert (await gp.backend().status(started.handle)).state is State.GONE, "the platform has started it again"

    # -- manners

    @on_runtime
    async def test_nothing_blocks_the_event_loop(self, gp: Installation) -> None:
        """All kernels of a server share one event loop with their sessions: no method may hold it for 100 ms."""
        with StallDetector.of_runtime() as detector:
            started = await gp.start()
            backend, handle = gp.backend(), started.handle
            with contextlib.suppress(Exception):  # what goes wrong here is another test's
                await backend.status(handle)
                await backend.signal(handle, signal.SIGINT)
                await backend.logs(handle)
                await backend.discover()
                await backend.check()
            with contextlib.suppress(Exception):
                await backend.terminate(handle, force=True)
            await asyncio.sleep(0.05)
        assert not detector.stalls, "\n".join(map(str, detector.stalls))

    # -- parts

    async def _nothing_left(self, gp: Installation, kernel_id: str) -> None:
        backend = gp.backend()

        async def empty() -> bool:
            return await backend.discover(kernel_id) == []

        for _ in range(2):
            assert await eventually(empty, self.end_timeout, every=min(0.1, self.settle)), (
                f"this is left: {await backend.discover(kernel_id)}"
            )
            await asyncio.sleep(self.settle)  # a job that was still on its way would be there now
        assert await eventually(lambda: gp.server.store.get(kernel_id) is None, self.end_timeout), "a record is left"


def _violations(cls: type[BackendContract]) -> Iterator[str]:
    tests = {
        name: value for name, value in vars(BackendContract).items() if name.startswith("test_") and callable(value)
    }
    for name, reason in cls.waivers.items():
        if name not in tests:
            yield f"waivers names {name}, which is no test of it"
        elif len(str(reason).split()) < 3:
            yield f"waivers gives no reason for {name}"
    for name, value in vars(BackendContract).items():
        if name in SETTINGS or name.startswith("__"):
            continue
        if inspect.getattr_static(cls, name, None) is value or name in cls.waivers:
            continue
        what = "is overridden or removed without a reason in waivers" if name in tests else "is not yours to override"
        yield f"{name} {what}"
    if inspect.getattr_static(cls, "__init_subclass__") is not vars(BackendContract)["__init_subclass__"]:
        yield "__init_subclass__ is overridden"


def _dumped(handle: Handle) -> str:
    try:
        return json.dumps(handle, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"the handle is not JSON: {error}: {handle!r}") from None


async def _failure(gp: Installation, request: Any) -> LaunchFailed:
    try:
        await gp.start(request)
    except LaunchTimeout as error:
        raise AssertionError(f"only the clock ended this start: {error}") from error
    except LaunchFailed as error:
        return error
    raise AssertionError("a start that cannot work was told as good")


_listeners: list[list[Any]] = []
_hooked = False


@contextlib.contextmanager
def _commands() -> Iterator[list[Any]]:
    """Collect the argv of every process that this one starts."""
    global _hooked
    commands: list[Any] = []
    if not _hooked:
        sys.addaudithook(_heard)  # for good: there is no way to remove one
        _hooked = True
    _listeners.append(commands)
    try:
        yield commands
    finally:
        _listeners.remove(commands)


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if _listeners and event in ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.system"):
        for commands in _listeners:
            commands.append(
                [os.fsdecode(argument) if isinstance(argument, bytes) else argument for argument in arguments[:2]]
            )
