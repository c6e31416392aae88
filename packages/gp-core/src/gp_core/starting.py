"""How one kernel begins: launched, replaced inside its launcher, or taken over from another process.

What goes on afterwards is in `gp_core.kernel`, and the loop that waits for a kernel in `gp_core.startup`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from . import protocol, protocol1, startup
from .backend import Handle, LaunchRequest
from .command import launch_environment
from .errors import (
    CANCELLED,
    KERNEL_UNREACHABLE,
    LAUNCH_TIMEOUT,
    LAUNCHER_NOT_BACK,
    ConfigError,
    LaunchFailed,
    LaunchTimeout,
)
from .events import Event
from .plugins import plugins
from .protocol import Message
from .runtime import runtime, within
from .startup import Report

if TYPE_CHECKING:
    from .kernel import RemoteKernel

MAX_BUNDLE = 120_000  # bytes; Linux allows 128 KiB for one variable
LATE = 60.0  # seconds that a backend may take to tell of a job whose start was given up
REACH = 5.0  # seconds for a port of a kernel to accept a connection
PATIENCE = 10.0  # seconds that the caller of a failed start waits for its clean-up


@dataclass(kw_only=True)
class Plan:
    """How one kernel is started, again and again.

    Args:
        request: For the backend; token and addresses are filled in at the launch.
        connection: Connection file of clients, with ports and keys; a port of 0 is chosen when the kernel starts.
        far: Connection file over there if channels are relayed; None: the same, and the launcher chooses its ports.
        blackout_buffer: Bytes of output that the launcher keeps while nobody takes it.
        timeout: Seconds of silence until a start is given up.
        confirm: What confirms a start: "listening", or "connected" (``startup_confirmation: "hello"``).
        older: What is demanded of a launcher of protocol 1; None for our own.
    """

    request: LaunchRequest
    connection: dict[str, Any] = field(repr=False)  # holds the kernel's keys
    timeout: float
    far: dict[str, Any] | None = field(default=None, repr=False)
    blackout_buffer: int = 0
    confirm: Literal["listening", "connected"] = "listening"
    older: protocol1.Terms | None = None

    def with_environment(self, more: Mapping[str, str]) -> Plan:
        """Return the plan with more variables for the kernel, taken literally."""
        more = launch_environment(kernelspec={}, requested=more, process={})
        return replace(self, request=replace(self.request, env={**self.request.env, **more})) if more else self


class Start:
    """One start of a kernel; there is at most one at a time.

    Args:
        kernel: To start.
        plan: How.

    Attributes:
        message: The request for a restart, until the launcher confirms that run: a lost session may have lost it.
    """

    def __init__(self, kernel: RemoteKernel, plan: Plan) -> None:
        self.message: Message | None = None
        self._kernel = kernel
        self._plan = plan
        self._timeout = plan.timeout
        self._reports: asyncio.Queue[Report] = asyncio.Queue()
        self._launching: asyncio.Task[Handle] | None = None
        self._heard = 0.0  # when the backend last told of progress: a long pull is not silence

    def report(self, report: Report) -> None:
        """Take note of what the launcher says."""
        self._reports.put_nowait(report)

    async def launch(self) -> None:
        """Start the kernel's job and wait until the kernel listens; what was started is removed if that fails.

        Raises:
            LaunchFailed: See `startup.confirmed`.
        """
        kernel, plan, server = self._kernel, self._plan, self._kernel.server
        token = secrets.token_urlsafe(32)
        self._begin_record(token)
        server.kernels[kernel.info.kernel_id] = kernel
        started = time.monotonic()
        try:
            self._ask_for_timeout()
            await self._choose_channels()
            await kernel.save()
            extra = await plugins().before_launch(plan.request)
            request = self._complete(token, extra)
            if plan.older is not None and server.protocol1 is not None:
                server.protocol1.expect(kernel, plan.older)
            if kernel.backend.runs_here:
                await server.gate.enter(kernel.is_connected)
                started = time.monotonic()  # the others' time is not this kernel's silence
            kernel.tell(Event.LAUNCHING)
            # a task of its own: when the start is cancelled the backend still tells what it has started
            self._launching = asyncio.create_task(kernel.backend.launch(request))
            self._heard = started
            kernel.record.handle = await self._launched(self._launching)
            recorded = runtime().loop.create_task(kernel.save())  # while the launcher starts
            recorded.add_done_callback(lambda task: task.cancelled() or task.exception())  # retrieved, if we fail first
            kernel.tell(Event.LAUNCHED)
            await self._confirm(self._heard, watch=True)
            await recorded  # whoever takes the kernel over needs the handle; the rest the launcher tells again
            kernel.save_soon()
        except BaseException as error:
            await self._give_up(error)
            raise
        finally:
            if server.protocol1 is not None:
                server.protocol1.forget(kernel)

    def _begin_record(self, token: str) -> None:
        plan, record, server = self._plan, self._kernel.record, self._kernel.server
        record.token, record.secret, record.handle, record.state = protocol.digest(token), None, None, "starting"
        record.run, record.created = 1, time.time()
        record.connection, record.owner = dict(plan.connection), server.owner
        record.port_range = str(plan.request.port_range)
        record.bind, record.pins = ",".join(server.addresses(local=self._kernel.backend.runs_here)), server.pins
        record.launcher_protocol = 2 if plan.older is None else 1

    async def _choose_channels(self) -> None:
        """Do as the plan says about the client's endpoints; relayed ones stay, whatever becomes of launchers."""
        kernel, record = self._kernel, self._kernel.record
        record.channels, record.blackout_buffer = "direct", 0
        if self._plan.far is not None:
            record.channels, record.blackout_buffer = "relay", self._plan.blackout_buffer
            record.connection |= await kernel.open_relay()
        elif kernel.relay is not None:
            kernel.relay.close()
            kernel.relay = None

    def _complete(self, token: str, extra: Mapping[str, str]) -> LaunchRequest:
        plan, request = self._plan, self._plan.request
        env = {**request.env, **extra}
        if plan.older is not None:
            return protocol1.with_environment(request, env)
        bundle = json.dumps({"token": token, "connection": plan.far or plan.connection, "env": env})
        if len(bundle) > MAX_BUNDLE:
            raise ConfigError(
                f"kernel {request.kernel_id}: its environment has {len(bundle)} bytes; {MAX_BUNDLE} can be sent"
            )
        return replace(request, env=env, secrets={"GP_LAUNCH_SECRETS": bundle}, progress=self._progress)

    def _progress(self, text: str) -> None:
        self._heard = time.monotonic()
        self._kernel.tell(Event.PROGRESS, text)

    async def _launched(self, launching: asyncio.Task[Handle]) -> Handle:
        while not launching.done():
            left = self._heard + self._timeout - time.monotonic()
            if left <= 0:
                raise LaunchTimeout(
                    f"{self._name}: {self._kernel.backend.name} did not take its job within {self._timeout:g} s",
                    reason=LAUNCH_TIMEOUT,
                )
            await asyncio.wait({launching}, timeout=left)
        return launching.result()

    async def restart(self) -> None:
        """Replace the kernel inside its launcher.

        Raises:
            LaunchFailed: See `startup.confirmed`.
        """
        kernel, request = self._kernel, self._plan.request
        self._ask_for_timeout()
        kernel.record.run += 1
        kernel.record.state = "starting"
        kernel.tell(Event.RESTARTING)
        argv = (
            kernel.backend.kernel_command(request.argv) if request.wrapped else None
        )  # else it is the launcher's own, which knows the kernel's
        message = protocol.restart(kernel.record.run, env=request.env, argv=argv, cwd=request.cwd)
        try:
            if kernel.relay is not None:
                await kernel.relay.open()  # jupyter_client has removed the paths of ipc
            await kernel.save()
            self.message = message
            kernel.send(message)
            self.report(Report("connected"))
            await self._confirm(time.monotonic(), watch=False)
            kernel.save_soon()
        except BaseException as error:
            await self._give_up(error)
            raise

    async def resume(self) -> bool:
        """Wait until a kernel that another process started, and is not gone, can be used here.

        Returns:
            Whether it can; False if it has ended.

        Raises:
            LaunchTimeout: Nobody knows; the kernel is left as it is.
        """
        kernel, record, handle = self._kernel, self._kernel.record, self._kernel.record.handle
        assert handle is not None
        self._ask_for_timeout()
        back = kernel.listens if self._plan.confirm == "listening" else kernel.is_connected
        waiting = [asyncio.ensure_future(event.wait()) for event in (back, kernel.has_ended)]
        try:
            done, _ = await asyncio.wait(waiting, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        if not done:
            raise await self._not_back(handle)
        if kernel.exit_code is not None:
            return False
        if record.host is None:
            record.host = (await kernel.backend.look(handle)).host
        record.state = "running"
        await kernel.save()
        kernel.tell(Event.ADOPTED, data={"host": record.host, "run": record.run})
        return True

    async def _not_back(self, handle: Handle) -> LaunchTimeout:
        kernel = self._kernel
        status = await kernel.backend.look(handle)
        job = f"its job: {status.state.value} {status.detail}".rstrip()
        known = f"{self._name} cannot be taken over"
        if kernel.session is not None:
            return LaunchTimeout(f"{known}: its launcher is back, it does not listen yet; {job}", reason=LAUNCH_TIMEOUT)
        where = kernel.record.bind or "the address that it was told"
        text = f"{known}: its launcher has not called back to {where} within {self._timeout:g} s; {job}"
        return LaunchTimeout(text, reason=LAUNCHER_NOT_BACK, log=await self._log_tail())

    # -- parts

    @property
    def _name(self) -> str:
        return f"kernel {self._kernel.info.kernel_id} ({self._kernel.info.kernel_name})"

    def _ask_for_timeout(self) -> None:
        self._timeout = plugins().timeout(self._kernel.info, "launch", self._plan.timeout)

    async def _confirm(self, since: float, *, watch: bool) -> None:
        kernel, record = self._kernel, self._kernel.record
        assert record.handle is not None
        await startup.confirmed(
            kernel.info,
            reports=_drain(self._reports),
            statuses=kernel.statuses(record.handle) if watch else None,
            judge=lambda status, elapsed: plugins().confirm_startup(kernel.info, status, elapsed),
            timeout=self._timeout,
            since=since,
            until=self._plan.confirm,
            log=self._log_tail,
        )
        if record.host is None and record.connection["ip"] in ("0.0.0.0", "::"):
            record.host = (await kernel.backend.look(record.handle)).host
        if watch and record.channels == "direct" and self._plan.confirm == "listening":
            await self._see_port()
        record.state = "running"
        self.message = None
        if protocol1.MUTE in kernel.capabilities:
            kernel.look()
        kernel.tell(Event.LISTENING, data={"host": record.host, "run": record.run})

    async def _see_port(self) -> None:
        """Connect as clients will: with a firewall between, they would wait for the kernel without a word."""
        where = self._kernel.connection
        if where["transport"] != "tcp":
            return
        host, port = where["ip"], where["shell_port"]
        try:
            _, writer = await within(REACH, asyncio.open_connection(host, port))
        except (OSError, asyncio.TimeoutError) as error:
            number = getattr(error, "errno", None)  # asyncio's own text has the address, and no reason
            why = os.strerror(number) if number else str(error) or f"no answer within {REACH:g} s"
            raise LaunchFailed(
                f"{self._name} runs and listens at {host} port {port}, which this machine cannot connect to: {why}",
                reason=KERNEL_UNREACHABLE,
            ) from None
        writer.close()

    async def _log_tail(self) -> str:
        handle = self._kernel.record.handle
        if handle is None:
            return ""
        with contextlib.suppress(Exception):  # the log only decorates the error that is on its way
            return await asyncio.wait_for(self._kernel.backend.logs(handle, tail=20), 3)
        return ""

    async def _give_up(self, error: BaseException) -> None:
        kernel = self._kernel
        cancelled = not isinstance(error, Exception)
        reason = CANCELLED if cancelled else getattr(error, "failure", None)
        detail = CANCELLED.advice if cancelled else str(error)
        kernel.tell(Event.FAILED, detail, data={"reason": reason.code if reason else None})
        kernel.leaving = True
        kernel.cleaning = runtime().spawn(self._clean_up(), name=f"clean-up of kernel {kernel.info.kernel_id}")
        if isinstance(error, Exception):
            await asyncio.wait({asyncio.shield(kernel.cleaning)}, timeout=PATIENCE)

    async def _clean_up(self) -> None:
        kernel = self._kernel
        if self._launching is not None and kernel.record.handle is None:
            with contextlib.suppress(Exception):
                kernel.record.handle = await asyncio.wait_for(self._launching, LATE)
            if kernel.record.handle is None:
                # the backend failed in the middle: whatever it has started answers to the kernel's id
                for handle in await plugins().discover(kernel.backend, kernel.info.kernel_id):
                    await kernel.backend.terminate(handle, force=True)
        await kernel.remove(force=True)


async def _drain(queue: asyncio.Queue[Report]) -> AsyncIterator[Report]:
    while True:
        yield await queue.get()
