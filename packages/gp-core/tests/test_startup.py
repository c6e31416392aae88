import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from gp_core.backend import KernelInfo, State, Status
from gp_core.errors import (
    CALLBACK_UNREACHABLE,
    KERNEL_DIED,
    LAUNCH_TIMEOUT,
    NO_PORT,
    LaunchFailed,
    LaunchTimeout,
    Reason,
)
from gp_core.policies import gp_confirm_startup
from gp_core.startup import Report, confirmed

KERNEL = KernelInfo(kernel_id="k1", kernel_name="python3", user="ann", backend="fake")
PULL = Reason("ImagePullBackOff", "Correct the image.")
RUNNING = Status(state=State.RUNNING)


async def told(*steps: object) -> AsyncIterator[object]:
    """Yield what is no number; sleep the numbers; then stay silent."""
    for step in steps:
        if isinstance(step, float):
            await asyncio.sleep(step)
        else:
            yield step
    await asyncio.sleep(60)


async def start(reports: list[object], statuses: list[object], timeout: float = 5.0, **more: object) -> float:
    began = time.monotonic()

    async def log() -> str:
        return "last line of the job"

    await confirmed(
        KERNEL,
        reports=told(*reports),  # type: ignore[arg-type]
        statuses=told(*statuses),  # type: ignore[arg-type]
        judge=lambda status, elapsed: gp_confirm_startup(KERNEL, status, elapsed),  # type: ignore[arg-type,return-value]
        timeout=timeout,
        log=log,
        **more,  # type: ignore[arg-type]
    )
    return time.monotonic() - began


async def test_listening_confirms() -> None:
    assert await start([Report("connected"), 0.05, Report("listening")], [RUNNING]) < 1


async def test_the_launchers_call_confirms_where_the_kernelspec_says_so() -> None:
    assert await start([Report("connected")], [RUNNING], until="connected") < 1


async def test_an_exit_fails_at_once_with_code_and_stderr() -> None:
    with pytest.raises(LaunchFailed, match="exit code 1") as caught:
        await start([Report("connected"), Report("exited", 1, "No module named ipykernel")], [RUNNING])
    assert (caught.value.failure, caught.value.exit_code) == (KERNEL_DIED, 1)
    assert "No module named ipykernel" in str(caught.value)


async def test_an_exit_by_signal_is_named_and_the_launchers_reason_is_kept() -> None:
    with pytest.raises(LaunchFailed, match="signal SIGKILL"):
        await start([Report("exited", -9)], [])
    with pytest.raises(LaunchFailed, match="none of the ports") as caught:
        await start([Report("exited", None, reason=NO_PORT, detail="none of the ports is free")], [])
    assert caught.value.failure is NO_PORT
    assert "last line of the job" in str(caught.value)


async def test_a_terminal_reason_fails_at_once() -> None:
    status = Status(state=State.PENDING, reason=PULL, terminal=True, detail="no such image")
    with pytest.raises(LaunchFailed, match="no such image") as caught:
        await start([], [Status(state=State.PENDING), 0.05, status])
    assert caught.value.failure is PULL


async def test_a_job_that_is_gone_fails_but_the_launchers_last_words_count_more() -> None:
    gone = Status(state=State.GONE, exit_code=7, detail="job failed")
    with pytest.raises(LaunchFailed, match="job failed"):
        await start([], [gone])
    with pytest.raises(LaunchFailed, match="exit code 3"):
        await start([0.1, Report("exited", 3, "stderr")], [gone])


async def test_a_platform_that_does_not_answer_kills_nothing() -> None:
    unknown = Status(state=State.UNKNOWN, detail="connection refused")
    assert await start([0.1, Report("listening")], [unknown, unknown]) < 1


async def test_silence_uses_the_timeout_and_says_what_is_known() -> None:
    with pytest.raises(LaunchTimeout, match=r"within 0.1 s; its job: running") as caught:
        await start([], [RUNNING], timeout=0.1)
    assert caught.value.failure is CALLBACK_UNREACHABLE
    with pytest.raises(LaunchTimeout, match="does not listen yet") as caught:
        await start([Report("connected")], [RUNNING], timeout=0.1)
    assert caught.value.failure is LAUNCH_TIMEOUT
    with pytest.raises(LaunchTimeout) as caught:
        await start([], [Status(state=State.PENDING, reason=PULL)], timeout=0.1)
    assert caught.value.failure is PULL


async def test_cancelling_leaves_no_task() -> None:
    before = asyncio.all_tasks()
    task = asyncio.create_task(start([], [RUNNING]))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == before
