"""The life of one remote kernel: launch, restart, signal, end.

Lives on the runtime's loop. Composes a backend (where the job runs), a launcher session (what the kernel does) and the
record in the store. jupyter_client's side is `gp_core.provisioner`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import signal as signals
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from traitlets import TraitError

from . import protocol, protocol1, startup
from .backend import Backend, Handle, KernelInfo, LaunchRequest, State, Status
from .command import launch_environment
from .errors import (
    CANCELLED,
    LAUNCH_TIMEOUT,
    LAUNCHER_DIED,
    LAUNCHER_NOT_BACK,
    LAUNCHER_TOO_OLD,
    BackendError,
    ConfigError,
    LaunchTimeout,
    ProtocolError,
    StoreError,
)
from .events import Announcer, Event, KernelEvent
from .plugins import plugins
from .ports import PortRange
from .protocol import Hello, Message
from .relay import PING as RELAY_PING
from .relay import Relay
from .rendezvous import PING, Session
from .runtime import runtime
from .server import KernelServer
from .startup import Report
from .store import InTurn, Record

LINGER = 60.0  # seconds that an exited kernel's job stays for a restart
REDIAL = 10.0  # seconds that a restart waits for a lost session to come back, before it takes another launcher
HICCUP = 2.0  # seconds that a signal waits for it, before the platform is asked to deliver it
MAX_BUNDLE = 120_000  # bytes; Linux allows 128 KiB for one variable
STOP = 10.0  # seconds for a job to end before it is killed
FAREWELL = 4.0  # seconds that the end of the process waits for a kernel that may be ending just now (console)
FORCED = 2.0  # the same in a hurry; not zero, because a launcher that is killed leaves files


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


class RemoteKernel:
    """One kernel out there.

    Args:
        server: Of this process.
        backend: Where the kernel's job runs.
        record: The kernel's record; written at once when it changes.
    """

    def __init__(self, server: KernelServer, backend: Backend, record: Record) -> None:
        self.server = server
        self.backend = backend
        self.record = record
        self.log = backend.log
        self.info = KernelInfo(
            kernel_id=record.kernel_id, kernel_name=record.kernel_name, user=record.user, backend=record.backend
        )
        self.exit_code: int | None = None  #: None while the kernel is taken for alive
        self.ended_at = 0.0  #: `time.monotonic` of its last end
        self.session: Session | None = None
        self.capabilities: frozenset[str] = frozenset()
        self.relay: Relay | None = None  #: None if clients connect to the kernel's own ports
        self.inherited = False  #: another process started it
        self.user: object | None = None  #: the manager of this process that has it; None: it is only kept alive
        self.leaving = False  #: it is being removed
        self._ended, self._listens, self._forgotten = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._connected, self._disconnected = asyncio.Event(), asyncio.Event()
        self._reports: asyncio.Queue[Report] = asyncio.Queue()
        self._starting = False
        self._removed = False
        self._restart: Message | None = None  # until the launcher confirms that run
        self._looking: asyncio.Task[None] | None = None
        self._records = InTurn(server.store)
        self._announcer = Announcer(self.info, self.log, plugins().kernel_event, plugins().hear_events)
        self._lingering: asyncio.TimerHandle | None = None

    @classmethod
    def of_record(cls, server: KernelServer, record: Record) -> RemoteKernel:
        """Make the object of a kernel that another process has started.

        Raises:
            PluginError: Its backend is not installed.
            ConfigError: Its backend does not know its options any more.
        """
        backend = plugins().backend(record.backend)
        try:
            return cls(server, backend(config=server.config, **record.options), record)
        except (TraitError, TypeError) as error:
            raise ConfigError(f"kernel {record.kernel_id}: {error}") from None

    # -- starting

    async def launch(self, plan: Plan) -> None:
        """Start the kernel's job and wait until the kernel listens; what was started is removed if that fails.

        Raises:
            LaunchFailed: See `startup.confirmed`.
        """
        token = secrets.token_urlsafe(32)
        record = self.record
        record.token, record.secret, record.handle, record.state = protocol.digest(token), None, None, "starting"
        record.run, record.created = 1, time.time()
        record.connection, record.owner = dict(plan.connection), self.server.owner
        record.port_range = str(plan.request.port_range)
        record.bind, record.pins = ",".join(self.server.addresses(local=self.backend.runs_here)), self.server.pins
        record.launcher_protocol = 2 if plan.older is None else 1
        self.inherited, self.user = False, self.user or self
        self._begin_start()
        self.server.kernels[record.kernel_id] = self
        launching: asyncio.Task[Handle] | None = None
        started = time.monotonic()
        try:
            timeout = plugins().timeout(self.info, "launch", plan.timeout)
            await self._choose_channels(plan)
            await self._save()
            extra = await plugins().before_launch(plan.request)
            request = self._complete(plan, token, extra)
            if plan.older is not None and self.server.protocol1 is not None:
                self.server.protocol1.expect(self, plan.older)
            if self.backend.runs_here:
                await self.server.gate.enter(self._connected)
                started = time.monotonic()  # the others' time is not this kernel's silence
            self._tell(Event.LAUNCHING)
            # a task of its own: when the start is cancelled the backend still tells what it has started
            launching = asyncio.create_task(self.backend.launch(request))
            record.handle = await self._launched(launching, timeout)
            recorded = runtime().loop.create_task(self._save())  # while the launcher starts
            recorded.add_done_callback(lambda task: task.cancelled() or task.exception())  # retrieved, if we fail first
            self._tell(Event.LAUNCHED)
            await self._confirm(plan, timeout, started, watch=True)
            await recorded  # whoever takes the kernel over needs the handle; the rest the launcher tells again
            self._save_soon()
        except BaseException as error:
            await self._give_up(error, launching)
            raise
        finally:
            self._starting = False
            if self.server.protocol1 is not None:
                self.server.protocol1.forget(self)

    def _complete(self, plan: Plan, token: str, extra: Mapping[str, str]) -> LaunchRequest:
        request = plan.request
        env = {**request.env, **extra}
        if plan.older is not None:
            return protocol1.with_environment(request, env)
        bundle = json.dumps({"token": token, "connection": plan.far or plan.connection, "env": env})
        if len(bundle) > MAX_BUNDLE:
            raise ConfigError(
                f"kernel {request.kernel_id}: its environment has {len(bundle)} bytes; {MAX_BUNDLE} can be sent"
            )
        return replace(request, env=env, secrets={"GP_LAUNCH_SECRETS": bundle})

    async def restart(self, plan: Plan) -> None:
        """Replace the kernel inside its launcher, or launch anew with the same ports and keys if the launcher is gone.

        Raises:
            LaunchFailed: See `startup.confirmed`.
        """
        self._stop_lingering()
        if not await self._reachable(REDIAL) or "restart" not in self.capabilities:
            self.log.info(
                "kernel %s: its launcher is gone or cannot restart; a full launch follows", self.info.kernel_id
            )
            await self.remove(forget=False)
            await self.launch(replace(plan, connection={**plan.connection, **self.ports}))
            return
        request = plan.request
        self.record.run += 1
        self.record.state = "starting"
        self._begin_start()
        self._tell(Event.RESTARTING)
        timeout = plugins().timeout(self.info, "launch", plan.timeout)
        argv = request.argv if request.wrapped else None  # else it is the launcher's own, which knows the kernel's
        message = protocol.restart(self.record.run, env=request.env, argv=argv, cwd=request.cwd)
        try:
            if self.relay is not None:
                await self.relay.open()  # jupyter_client has removed the paths of ipc
            await self._save()
            self._restart = message
            self._send(message)
            self._report(Report("connected"))
            await self._confirm(plan, timeout, time.monotonic(), watch=False)
            self._save_soon()
        except BaseException as error:
            await self._give_up(error, None)
            raise
        finally:
            self._starting = False

    async def is_gone(self) -> bool:
        """Look whether the platform is sure that a kernel that another process started has no job any more.

        Raises:
            BackendError: The record does not say which job it is, and the platform does not tell.
        """
        record = self.record
        if record.handle is None:  # its server died while the backend started the job
            try:
                # not the hook: it hides a platform that does not answer, which must not look like a job that is gone
                record.handle = next(iter(await self.backend.discover(record.kernel_id)), None)
            except Exception as error:
                raise BackendError(f"kernel {record.kernel_id}: {self.backend.name} does not tell: {error}") from error
        return record.handle is None or (await self.backend.look(record.handle)).state is State.GONE

    async def resume(self, *, until: Literal["listening", "connected"], timeout: float) -> bool:
        """Wait until a kernel that another process started, and is not gone, can be used here.

        Args:
            until: What proves that, as in `Plan`.
            timeout: Seconds for its launcher to call back.

        Returns:
            Whether it can; False if it has ended.

        Raises:
            LaunchTimeout: Nobody knows; the kernel is left as it is.
        """
        record, handle = self.record, self.record.handle
        timeout = plugins().timeout(self.info, "launch", timeout)
        assert handle is not None
        self._starting = True  # an end that is told now must not begin to linger
        self._stop_lingering()
        if self.session is None:
            self._look()
        back = self._listens if until == "listening" else self._connected
        waiting = [asyncio.ensure_future(event.wait()) for event in (back, self._ended)]
        try:
            done, _ = await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._starting = False
            for task in waiting:
                task.cancel()
            if self.session is not None:
                self._stop_looking()
        if not done:
            raise await self._not_back(timeout)
        if self.exit_code is not None:
            return False
        if record.host is None:
            record.host = (await self.backend.look(handle)).host
        record.state = "running"
        await self._save()
        self._tell(Event.ADOPTED, data={"host": record.host, "run": record.run})
        return True

    async def _not_back(self, timeout: float) -> LaunchTimeout:
        assert self.record.handle is not None
        status = await self.backend.look(self.record.handle)
        job = f"its job: {status.state.value} {status.detail}".rstrip()
        known = f"kernel {self.info.kernel_id} ({self.info.kernel_name}) cannot be taken over"
        if self.session is not None:
            return LaunchTimeout(f"{known}: its launcher is back, it does not listen yet; {job}", reason=LAUNCH_TIMEOUT)
        where = self.record.bind or "the address that it was told"
        text = f"{known}: its launcher has not called back to {where} within {timeout:g} s; {job}"
        return LaunchTimeout(text, reason=LAUNCHER_NOT_BACK, log=await self._log_tail())

    async def disown(self, former: Record) -> None:
        """Let another server have a kernel that could not be taken over: it has the lease that it had."""
        self._stop_looking()
        if self.relay is not None:
            self.relay.close()
        try:
            await self._records.put(replace(self.record, owner=former.owner, left=former.left))
        except StoreError as error:
            self.log.warning("%s", error)

    @property
    def ports(self) -> dict[str, int]:
        """Where the kernel listens; kept over restarts, because clients keep their sockets."""
        return {name: self.record.connection[name] for name in protocol.PORTS if self.record.connection.get(name)}

    @property
    def connection(self) -> dict[str, Any]:
        """What a client needs to connect; the host is the platform's word, not the launcher's."""
        return self.record.endpoints

    async def _choose_channels(self, plan: Plan) -> None:
        """Do as the plan says about the client's endpoints; relayed ones stay, whatever becomes of launchers."""
        self.record.channels, self.record.blackout_buffer = "direct", 0
        if plan.far is not None:
            self.record.channels, self.record.blackout_buffer = "relay", plan.blackout_buffer
            self.record.connection |= await self.open_relay()
        elif self.relay is not None:
            self.relay.close()
            self.relay = None

    async def open_relay(self) -> dict[str, Any]:
        """Open the client's endpoints, those of the record if it has them, and return where they are.

        Raises:
            LaunchFailed: One of them is taken.
        """
        self.relay = self.relay or Relay(self.info.kernel_id, self.record.connection, self._save_soon)
        await self.relay.open()
        return self.relay.endpoint

    def _begin_start(self) -> None:
        self._starting = True
        self._removed = self.leaving = False
        self.exit_code = None
        for event in (self._ended, self._listens, self._forgotten):
            event.clear()
        self._reports = asyncio.Queue()

    async def _launched(self, launching: asyncio.Task[Handle], timeout: float) -> Handle:
        try:
            return await asyncio.wait_for(asyncio.shield(launching), timeout)
        except asyncio.TimeoutError:
            raise LaunchTimeout(
                f"kernel {self.info.kernel_id} ({self.info.kernel_name}): {self.backend.name} did not take its job "
                f"within {timeout:g} s",
                reason=LAUNCH_TIMEOUT,
            ) from None

    async def _confirm(self, plan: Plan, timeout: float, since: float, *, watch: bool) -> None:
        assert self.record.handle is not None
        await startup.confirmed(
            self.info,
            reports=_drain(self._reports),
            statuses=self._statuses(self.record.handle) if watch else None,
            judge=lambda status, elapsed: plugins().confirm_startup(self.info, status, elapsed),
            timeout=timeout,
            since=since,
            until=plan.confirm,
            log=self._log_tail,
        )
        if self.record.host is None and self.record.connection["ip"] in ("0.0.0.0", "::"):
            self.record.host = (await self.backend.look(self.record.handle)).host
        self.record.state = "running"
        self._restart = None
        if protocol1.MUTE in self.capabilities:
            self._look()
        self._tell(Event.LISTENING, data={"host": self.record.host, "run": self.record.run})

    async def _statuses(self, handle: Handle) -> AsyncIterator[Status]:
        last = None
        async for status in self.backend.watch(handle):
            self.record.host = status.host or self.record.host
            if status != last:
                self._tell(Event.PROGRESS, f"{status.state.value} {status.detail}".strip())
            last = status
            yield status

    async def _log_tail(self) -> str:
        if self.record.handle is None:
            return ""
        with contextlib.suppress(Exception):  # the log only decorates the error that is on its way
            return await asyncio.wait_for(self.backend.logs(self.record.handle, tail=20), 3)
        return ""

    async def _give_up(self, error: BaseException, launching: asyncio.Task[Handle] | None) -> None:
        cancelled = not isinstance(error, Exception)
        reason = CANCELLED if cancelled else getattr(error, "failure", None)
        detail = CANCELLED.advice if cancelled else str(error)
        self._tell(Event.FAILED, detail, data={"reason": reason.code if reason else None})
        self.leaving = True
        cleaning = runtime().spawn(self._clean_up(launching), name=f"clean-up of kernel {self.info.kernel_id}")
        if isinstance(error, Exception):
            await asyncio.wait({asyncio.shield(cleaning)}, timeout=STOP)

    async def _clean_up(self, launching: asyncio.Task[Handle] | None) -> None:
        if launching is not None and self.record.handle is None:
            with contextlib.suppress(Exception):
                self.record.handle = await asyncio.wait_for(launching, 60)
            if self.record.handle is None:
                # the backend failed in the middle: whatever it has started answers to the kernel's id
                for handle in await plugins().discover(self.backend, self.info.kernel_id):
                    await self.backend.terminate(handle, force=True)
        await self.remove(force=True)

    # -- what the launcher says (called by the rendezvous)

    def connected(self, session: Session, hello: Hello) -> Message:
        again = self.record.secret is not None
        if hello.ports is not None:
            self._take_ports(hello.ports)
        if self.session is not None:
            self.session.kernel = None  # the launcher has redialled: the old session is fenced off
            self.session.close("replaced by a newer session of the same launcher")
        carried, session.ping = None, PING
        if self.relay is not None:
            if "relay" not in hello.capabilities:
                text = f"its launcher ({hello.launcher}) cannot carry channels"
                self._report(Report("exited", reason=LAUNCHER_TOO_OLD, detail=text))
                raise ProtocolError(text)
            carried = self.relay.connected(session, hello.relay, self.record.blackout_buffer)
            session.ping = RELAY_PING
        if not again:
            self.record.secret = protocol.digest(hello.secret)
            self._save_soon()
        if self.inherited and self._restart is None:
            self.record.run = hello.run  # its server may have died between the record and the message of a restart
        self.session, self.capabilities = session, hello.capabilities
        self._connected.set()
        self._disconnected.clear()
        if protocol1.MUTE not in self.capabilities:
            self._stop_looking()
        back = f"launcher {hello.launcher} at {session.address}"
        self._tell(Event.RESUMED if again else Event.CONNECTED, back, data=self._traffic)
        self._report(Report("connected"))
        if self._restart is not None and hello.run < self.record.run:
            restart = self._restart
            asyncio.get_running_loop().call_soon(self._send, restart)  # after the answer
        lease = self.record.orphan_timeout
        return protocol.accepted(orphan_timeout=lease, linger=LINGER, ping=session.ping, relay=carried)

    def relayed(self, session: Session, kind: int, stream: int, payload: bytes) -> None:
        if self.relay is not None and session is self.session:
            self.relay.receive(kind, stream, payload)

    def writable(self, session: Session) -> None:
        if self.relay is not None and session is self.session:
            self.relay.writable()

    def received(self, session: Session, message: Message) -> None:
        kind = message["type"]
        if session is not self.session or kind not in ("listening", "exited", "dropped"):
            return
        if kind == "dropped":
            dropped = protocol.Dropped.read(message)
            text = f"{dropped.messages} messages ({dropped.size} bytes): nobody took them, and blackout_buffer was full"
            self._tell(Event.DROPPED, text, data={"messages": dropped.messages, "bytes": dropped.size})
        elif kind == "listening":
            listening = protocol.Listening.read(message)
            if listening.run == self.record.run:
                self._take_ports(listening.ports)
                self._listens.set()
                self._report(Report("listening"))
        else:
            exited = protocol.Exited.read(message)
            if exited.run == self.record.run:
                report = Report("exited", exited.code, exited.stderr, exited.reason, exited.detail)
                self._has_ended(1 if exited.code is None else exited.code, report)

    def disconnected(self, session: Session) -> None:
        if session is not self.session:
            return
        self.session = None
        if self.relay is not None:
            self.relay.disconnected()
        self._connected.clear()
        self._disconnected.set()
        if self._removed:
            return
        self._tell(Event.LOST, data=self._traffic)
        self._look()

    def _report(self, report: Report) -> None:
        if self._starting:  # a launcher that never stops reporting must not fill the memory
            self._reports.put_nowait(report)

    def _take_ports(self, ports: Mapping[str, int]) -> None:
        if self.relay is not None:
            return  # the launcher's own business
        allowed = PortRange.parse(self.record.port_range)
        for name, port in ports.items():
            if self.record.connection["transport"] == "tcp" and port not in allowed:
                raise ProtocolError(f"{name} {port} is outside port_range {allowed}")
        self.record.connection |= ports

    def _has_ended(self, code: int, report: Report) -> None:
        self._report(report)
        if self.exit_code is not None or self._removed:
            return
        self.exit_code, self.ended_at = code, time.monotonic()
        self.record.state = "exited"
        self._ended.set()
        self._tell(Event.EXITED, report.detail or startup.exit_text(code), data={"exit_code": code})
        if not self._starting:
            self._lingering = asyncio.get_running_loop().call_later(
                LINGER, lambda: runtime().spawn(self.remove(), name=f"clean-up of kernel {self.info.kernel_id}")
            )

    def _look(self) -> None:
        if self._looking is None:
            self._looking = runtime().spawn(self._look_after(), name=f"watch of kernel {self.info.kernel_id}")

    async def _look_after(self) -> None:
        """While no session tells, ask the platform; only its word that the job is gone ends the kernel."""
        assert self.record.handle is not None
        async for status in self._statuses(self.record.handle):
            if status.state is State.GONE:
                self._job_is_gone(status)
                return

    def _job_is_gone(self, status: Status) -> None:
        if self.relay is not None:
            self.relay.renew()
        if self.exit_code is not None:  # a launcher that is told to end tells of its kernel, and knows no reason
            if status.detail:
                self._tell(Event.GONE, status.detail, data={"reason": status.reason.code if status.reason else None})
            return
        detail = status.detail or "its job is gone"
        report = Report("exited", status.exit_code, reason=status.reason or LAUNCHER_DIED, detail=detail)
        self._has_ended(1 if status.exit_code is None else status.exit_code, report)

    # -- what jupyter_client wants

    async def signal(self, signum: int) -> None:
        """Send a signal to the kernel's process group; one that is dead already is fine."""
        if self.exit_code is not None:
            return
        if await self._reachable(0 if protocol1.MUTE in self.capabilities else HICCUP):  # those never dial again
            self._send(protocol.signal(signum))
        elif self.record.handle is not None and not await self._signal_by_platform(signum):
            if signum in (signals.SIGKILL, signals.SIGTERM):
                await self.backend.terminate(self.record.handle, force=signum == signals.SIGKILL)
            else:
                self.log.warning("kernel %s cannot be signalled: its launcher is not connected", self.info.kernel_id)

    def end_requested(self) -> None:
        """The kernel was asked to end by a message of its own."""
        if protocol1.MUTE in self.capabilities:
            self._send(protocol1.RELEASE)

    async def _signal_by_platform(self, signum: int) -> bool:
        assert self.record.handle is not None
        try:
            return await self.backend.signal(self.record.handle, signum)
        except BackendError as error:
            self.log.warning("kernel %s: %s", self.info.kernel_id, error)
            return False

    async def wait(self) -> int:
        """Wait for the kernel's end and return its exit code."""
        await self._ended.wait()
        return self.exit_code if self.exit_code is not None else 1

    async def remove(self, *, force: bool = False, forget: bool = True) -> None:
        """End launcher and job and forget the kernel; harmless when they are gone.

        Args:
            force: Give launcher and job little time to end by themselves.
            forget: Remove the record too; False before a full launch of the same kernel.
        """
        self._stop_lingering()
        self._stop_looking()
        already, self._removed = self._removed, True
        self.leaving = self.leaving or forget
        if self.session is not None:
            self._send(protocol.shutdown(0 if force else 2))
        if self.record.handle is not None:
            await self._terminate(self.record.handle, FORCED if force else STOP)
        if self.exit_code is None:
            self.exit_code = -int(signals.SIGKILL)
            self._ended.set()
        if self.relay is not None:
            self.relay.renew()
        if forget:
            if self.relay is not None:
                self.relay.close()
            try:
                await self._records.remove(self.info.kernel_id)
            except StoreError as error:
                self.log.warning("%s", error)
            if self.server.kernels.get(self.info.kernel_id) is self:
                del self.server.kernels[self.info.kernel_id]
            self._forgotten.set()
            if not already:
                self._tell(Event.REMOVED)

    async def _terminate(self, handle: Handle, grace: float) -> None:
        """End a job: the launcher has been asked and tidies up; then the platform asks; then it kills."""
        if self.session is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._disconnected.wait(), grace)
        for force, patience in ((False, grace), (True, STOP)):
            try:
                await self.backend.terminate(handle, force=force)
                await asyncio.wait_for(self._gone(handle), patience)
                return
            except asyncio.TimeoutError:
                continue
            except BackendError as error:
                self.log.warning("kernel %s: its job cannot be ended: %s", self.info.kernel_id, error)
                return
        self.log.warning("kernel %s: its job did not end in time", self.info.kernel_id)

    async def _gone(self, handle: Handle) -> None:
        async for status in self.backend.watch(handle):
            if status.state in (State.GONE, State.UNKNOWN):
                return

    async def abandon(self) -> None:
        """Remove a kernel whose start was confirmed just when the caller gave it up."""
        if not self._starting and not self._removed:
            await self.remove(force=True)

    async def farewell(self) -> None:
        """At the end of the process: forget a kernel that ends just now; leave one that lives to its lease."""
        try:
            await asyncio.wait_for(self._ended.wait(), FAREWELL)
        except asyncio.TimeoutError:
            if not self.leaving:
                self.record.left = time.time()
                await self._save()
        else:
            await self.remove()

    async def forgotten(self, patience: float) -> None:
        """Wait some seconds for the end of a removal."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._forgotten.wait(), patience)

    # -- small parts

    def _send(self, message: Message) -> None:
        if self.session is not None:
            self.session.send(message)

    async def _reachable(self, patience: float) -> bool:
        """Whether the launcher is connected, or is again within some seconds, if its job still runs."""
        if self.session is None and self.record.handle is not None:
            status = await self.backend.look(self.record.handle)
            if status.state is not State.GONE:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._connected.wait(), patience)
        return self.session is not None

    def _stop_lingering(self) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None

    def _stop_looking(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None

    @property
    def _traffic(self) -> dict[str, Any]:
        return {} if self.relay is None else {"traffic": self.relay.traffic}

    async def _save(self) -> None:
        self.record.traffic = None if self.relay is None else self.relay.traffic
        await self._records.put(replace(self.record))

    def _save_soon(self) -> None:
        runtime().spawn(self._save(), name=f"record of kernel {self.info.kernel_id}")

    def _tell(self, event: Event, detail: str = "", data: Mapping[str, Any] | None = None) -> None:
        self._announcer.tell(KernelEvent(event=event, detail=detail, data=data or {}))


async def _drain(queue: asyncio.Queue[Report]) -> AsyncIterator[Report]:
    while True:
        yield await queue.get()
