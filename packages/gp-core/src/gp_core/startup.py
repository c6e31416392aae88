"""Wait until a starting kernel listens, is known to be dead, or is late; says why."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from .backend import KernelInfo, State, Status
from .errors import (
    CALLBACK_UNREACHABLE,
    KERNEL_DIED,
    LAUNCH_TIMEOUT,
    LAUNCHER_DIED,
    TLS_UNSUPPORTED,
    LaunchFailed,
    LaunchTimeout,
    Reason,
)


@dataclass(frozen=True)
class Verdict:
    """What a plugin thinks of a starting kernel: go on waiting, or give up for a reason."""

    wait: bool
    reason: Reason = LAUNCHER_DIED
    detail: str = ""


WAIT = Verdict(wait=True)


def FAIL(reason: Reason, detail: str = "") -> Verdict:
    """Give a start up."""
    return Verdict(wait=False, reason=reason, detail=detail)


@dataclass(frozen=True)
class Report:
    """What a launcher reported of its kernel's start.

    Args:
        state: "connected": it called back; "listening": the kernel's sockets accept; "exited": the kernel is gone.
        exit_code: Negative for a signal.
        stderr: Last lines of the kernel's standard error.
        reason: Typed reason of the launcher, if it could not even start the kernel.
        detail: The launcher's own words.
    """

    state: Literal["connected", "listening", "exited"]
    exit_code: int | None = None
    stderr: str = ""
    reason: Reason = KERNEL_DIED
    detail: str = ""


async def confirmed(
    kernel: KernelInfo,
    *,
    reports: AsyncIterator[Report],
    statuses: AsyncIterator[Status] | None,
    judge: Callable[[Status, float], Verdict],
    timeout: float,
    since: float | None = None,
    until: Literal["listening", "connected"] = "listening",
    log: Callable[[], Awaitable[str]],
    progress: Callable[[Status], None] = lambda status: None,
) -> None:
    """Return when a starting kernel is confirmed.

    The launcher's reports and the platform's statuses are heard at once; the first that decides ends the wait.

    Args:
        kernel: For the texts.
        reports: Of its launcher, one after the other.
        statuses: Of its job, as `Backend.watch` yields them; None if the job is not looked at.
        judge: Of one status and the seconds since the start.
        timeout: Seconds of silence until the start is given up.
        since: `time.monotonic` when the seconds began to count; default: now.
        until: Which report confirms.
        log: Fetches the last lines of the job's output, for the error.
        progress: Told of every status.

    Raises:
        LaunchFailed: The kernel or its job is gone, or a reason cannot heal.
        LaunchTimeout: Nothing decided in time.
    """
    started = time.monotonic() if since is None else since
    seen: list[Report] = []
    last: list[Status] = []

    async def hear() -> None:
        async for report in reports:
            seen.append(report)
            if report.state == "exited":
                code = "" if report.exit_code is None else f" with {exit_text(report.exit_code)}"
                text = f"kernel {kernel.kernel_id} ({kernel.kernel_name}) ended{code} before it listened"
                raise LaunchFailed(
                    f"{text}: {report.detail}" if report.detail else text,
                    reason=report.reason,
                    exit_code=report.exit_code,
                    log=report.stderr or await log(),
                )
            if report.state in ("listening", until):
                return

    async def look() -> None:
        if statuses is None:
            return
        async for status in statuses:
            last[:] = [status]
            progress(status)
            verdict = judge(status, time.monotonic() - started)
            if not verdict.wait:
                await asyncio.sleep(0.2)  # the launcher's own last words may be on their way, and say more
                said = await log()
                detail = verdict.detail or status.detail or f"its job is {status.state.value}"
                raise LaunchFailed(
                    f"kernel {kernel.kernel_id} ({kernel.kernel_name}) did not start: {detail}",
                    # a launcher that cannot speak TLS 1.3 has no other way to tell
                    reason=TLS_UNSUPPORTED if f"{TLS_UNSUPPORTED.code}:" in said else verdict.reason,
                    exit_code=status.exit_code,
                    log=said,
                )

    hearing, looking = asyncio.ensure_future(hear()), asyncio.ensure_future(look())
    pending = {hearing, looking}
    try:
        while not hearing.done():
            left = started + timeout - time.monotonic()
            done, pending = await asyncio.wait(pending, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise _late(kernel, timeout, connected=bool(seen), last=last, log=await log())
            for task in sorted(done, key=lambda task: task is looking):  # the launcher knows best why it ended
                task.result()
    finally:
        await _cancelled(hearing, looking)


async def _cancelled(*tasks: asyncio.Task[None]) -> None:
    """Cancel tasks and wait for their end; a backend's `asyncio.wait_for` may lose the first attempt (gh-86296)."""
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=1.0)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # retrieved


def _late(kernel: KernelInfo, timeout: float, *, connected: bool, last: list[Status], log: str) -> LaunchTimeout:
    status = last[0] if last else None
    detail = f"; its job: {status.state.value} {status.detail}".rstrip() if status else ""
    if status and status.reason:
        reason = status.reason
    elif connected:
        reason = LAUNCH_TIMEOUT
        detail = "; its launcher called back, the kernel does not listen yet"
    else:
        reason = CALLBACK_UNREACHABLE if status and status.state is State.RUNNING else LAUNCH_TIMEOUT
    text = f"kernel {kernel.kernel_id} ({kernel.kernel_name}) was not ready within {timeout:g} s{detail}"
    return LaunchTimeout(text, reason=reason, log=log)


def exit_text(code: int) -> str:
    """Return an exit code in words; negative for a signal."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
