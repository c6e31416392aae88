"""The life of one remote kernel: sessions, signals, its end; how it begins is in `gp_core.starting`.

Lives on the runtime's loop. Composes a backend (where the job runs), a launcher session (what the kernel does) and the
record in the store. jupyter_client's side is `gp_core.provisioner`.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal as signals
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from typing import Any

from traitlets import TraitError

from . import protocol, protocol1, startup
from .backend import Backend, Handle, KernelInfo, State, Status
from .errors import (
    LAUNCHER_DIED,
    LAUNCHER_TOO_OLD,
    BackendError,
    ConfigError,
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
from .starting import Plan, Start
from .startup import Report
from .store import InTurn, Record

LINGER = 60.0  # seconds that an exited kernel's job stays for a restart
REDIAL = 10.0  # seconds that a restart waits for a lost session to come back, before it takes another launcher
HICCUP = 2.0  # seconds that a signal waits for it, before the platform is asked to deliver it
MAX_BUNDLE = 120_000  # bytes; Linux allows 128 KiB for one variable
STOP = 10.0  # seconds for a job to end before it is killed
FAREWELL = 4.0  # seconds that the end of the process waits for a kernel that may be ending just now (console)
FORCED = 2.0  # the same in a hurry; not zero, because a launcher that is killed leaves files


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
        self.cleaning: asyncio.Task[None] | None = None  #: removes what a start that failed or was cancelled has left
        self.is_connected, self._disconnected = asyncio.Event(), asyncio.Event()
        self.listens, self.has_ended, self._forgotten = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._start: Start | None = None
        self._removed = False
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
        self.inherited, self.user = False, self.user or self
        with self._begun(plan) as start:
            await start.launch()

    async def restart(self, plan: Plan) -> None:
        """Replace the kernel inside its launcher, or launch anew with the same ports and keys if the launcher is gone.

        Raises:
            LaunchFailed: See `startup.confirmed`.
        """
        self._stop_lingering()
        if self.cleaning is not None:
            await asyncio.wait({self.cleaning})
        if await self._reachable(REDIAL) and "restart" in self.capabilities:
            with self._begun(plan) as start:
                await start.restart()
            return
        self.log.info("kernel %s: its launcher is gone or cannot restart; a full launch follows", self.info.kernel_id)
        await self.remove(forget=False)
        await self.launch(replace(plan, connection={**plan.connection, **self.ports}))

    async def resume(self, plan: Plan) -> bool:
        """Wait until a kernel that another process started, and is not gone, can be used here.

        Args:
            plan: Says how long, and what proves it.

        Returns:
            Whether it can; False if it has ended.

        Raises:
            LaunchTimeout: Nobody knows; the kernel is left as it is.
        """
        self._stop_lingering()
        if self.session is None:
            self.look()
        with self._begun(plan, anew=False) as start:
            try:
                return await start.resume()
            finally:
                if self.session is not None:
                    self._stop_looking()

    @contextlib.contextmanager
    def _begun(self, plan: Plan, *, anew: bool = True) -> Iterator[Start]:
        if anew:
            self._removed = self.leaving = False
            self.exit_code = None
            for event in (self.has_ended, self.listens, self._forgotten):
                event.clear()
        self._start = start = Start(self, plan)
        try:
            yield start
        finally:
            self._start = None

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

    async def open_relay(self) -> dict[str, Any]:
        """Open the client's endpoints, those of the record if it has them, and return where they are.

        Raises:
            LaunchFailed: One of them is taken.
        """
        self.relay = self.relay or Relay(self.info.kernel_id, self.record.connection, self.save_soon)
        await self.relay.open()
        return self.relay.endpoint

    async def statuses(self, handle: Handle) -> AsyncIterator[Status]:
        """Follow the kernel's job: tell what is new of it, and keep in mind where it runs."""
        last = None
        async for status in self.backend.watch(handle):
            self.record.host = status.host or self.record.host
            if status != last:
                self.tell(Event.PROGRESS, f"{status.state.value} {status.detail}".strip())
            last = status
            yield status

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
            self.save_soon()
        restart = self._start.message if self._start is not None else None
        if self.inherited and restart is None:
            self.record.run = hello.run  # its server may have died between the record and the message of a restart
        self.session, self.capabilities = session, hello.capabilities
        self.is_connected.set()
        self._disconnected.clear()
        if protocol1.MUTE not in self.capabilities:
            self._stop_looking()
        back = f"launcher {hello.launcher} at {session.address}"
        self.tell(Event.RESUMED if again else Event.CONNECTED, back, data=self._traffic)
        self._report(Report("connected"))
        if restart is not None and hello.run < self.record.run:
            asyncio.get_running_loop().call_soon(self.send, restart)  # after the answer
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
            self.tell(Event.DROPPED, text, data={"messages": dropped.messages, "bytes": dropped.size})
        elif kind == "listening":
            listening = protocol.Listening.read(message)
            if listening.run == self.record.run:
                self._take_ports(listening.ports)
                self.listens.set()
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
        self.is_connected.clear()
        self._disconnected.set()
        if self._removed:
            return
        self.tell(Event.LOST, data=self._traffic)
        self.look()

    def _report(self, report: Report) -> None:
        if self._start is not None:  # a launcher that never stops reporting must not fill the memory
            self._start.report(report)

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
        self.has_ended.set()
        self.tell(Event.EXITED, report.detail or startup.exit_text(code), data={"exit_code": code})
        if self._start is None:
            self._lingering = asyncio.get_running_loop().call_later(LINGER, self._removal)

    def look(self) -> None:
        """Ask the platform from now on, until the launcher is back."""
        if self._looking is None:
            self._looking = runtime().spawn(self._look_after(), name=f"watch of kernel {self.info.kernel_id}")

    async def _look_after(self) -> None:
        """While no session tells, ask the platform; only its word that the job is gone ends the kernel."""
        assert self.record.handle is not None
        async for status in self.statuses(self.record.handle):
            if self._looking is not asyncio.current_task():
                return  # was cancelled, and the backend did not notice
            if status.state is State.GONE:
                self._job_is_gone(status)
                return

    def _job_is_gone(self, status: Status) -> None:
        if self.relay is not None:
            self.relay.renew()
        if self.exit_code is not None:  # a launcher that is told to end tells of its kernel, and knows no reason
            if status.detail:
                self.tell(Event.GONE, status.detail, data={"reason": status.reason.code if status.reason else None})
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
            self.send(protocol.signal(signum))
        elif self.record.handle is not None and not await self._signal_by_platform(signum):
            if signum in (signals.SIGKILL, signals.SIGTERM):
                await self.backend.terminate(self.record.handle, force=signum == signals.SIGKILL)
            else:
                self.log.warning("kernel %s cannot be signalled: its launcher is not connected", self.info.kernel_id)

    def end_requested(self) -> None:
        """The kernel was asked to end by a message of its own."""
        if protocol1.MUTE in self.capabilities:
            self.send(protocol1.RELEASE)

    async def _signal_by_platform(self, signum: int) -> bool:
        assert self.record.handle is not None
        try:
            return await self.backend.signal(self.record.handle, signum)
        except BackendError as error:
            self.log.warning("kernel %s: %s", self.info.kernel_id, error)
            return False

    async def wait(self) -> int:
        """Wait for the kernel's end and return its exit code."""
        await self.has_ended.wait()
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
            self.send(protocol.shutdown(0 if force else 2))
        if self.record.handle is not None:
            await self._terminate(self.record.handle, FORCED if force else STOP)
        if self.exit_code is None:
            self.exit_code = -int(signals.SIGKILL)
            self.has_ended.set()
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
            if self.session is not None:  # it has come back meanwhile, and knows nothing of all this
                self.session.close("its kernel is removed")
            if not already:
                self.tell(Event.REMOVED)

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
            except Exception as error:  # also of a broken backend: the kernel must be forgotten
                self.log.warning("kernel %s: its job cannot be ended: %s", self.info.kernel_id, error)
                return
        self.log.warning("kernel %s: its job did not end in time", self.info.kernel_id)

    async def _gone(self, handle: Handle) -> None:
        async for status in self.backend.watch(handle):
            if status.state in (State.GONE, State.UNKNOWN):
                return

    async def abandon(self) -> None:
        """Remove a kernel whose start was confirmed just when the caller gave it up."""
        given_up = self.cleaning is not None and not self.cleaning.done()  # by the start itself
        if self._start is None and not self._removed and not given_up:
            self.cleaning = asyncio.current_task()
            await self.remove(force=True)

    async def dismiss(self) -> None:
        """Remove a kernel, to the end even if the caller does not wait for it."""
        await asyncio.shield(self._removal())

    def _removal(self) -> asyncio.Task[None]:
        self.cleaning = runtime().spawn(self.remove(), name=f"clean-up of kernel {self.info.kernel_id}")
        return self.cleaning

    async def farewell(self) -> None:
        """At the end of the process: forget a kernel that ends just now; leave one that lives to its lease."""
        try:
            await asyncio.wait_for(self.has_ended.wait(), FAREWELL)
        except asyncio.TimeoutError:
            if not self.leaving:
                self.record.left = time.time()
                await self.save()
        else:
            await self.remove()

    async def forgotten(self, patience: float) -> None:
        """Wait some seconds for the end of a removal."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._forgotten.wait(), patience)

    # -- small parts

    def send(self, message: Message) -> None:
        """Tell the launcher something; without effect while it is not connected."""
        if self.session is not None:
            self.session.send(message)

    async def _reachable(self, patience: float) -> bool:
        """Whether the launcher is connected, or is again within some seconds, if its job still runs."""
        if self.session is None and self.record.handle is not None:
            status = await self.backend.look(self.record.handle)
            if status.state is not State.GONE:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.is_connected.wait(), patience)
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

    async def save(self) -> None:
        """Write the record.

        Raises:
            StoreError: It cannot be written.
        """
        self.record.traffic = None if self.relay is None else self.relay.traffic
        await self._records.put(replace(self.record))

    def save_soon(self) -> None:
        """Write the record, and wait for nothing."""
        runtime().spawn(self.save(), name=f"record of kernel {self.info.kernel_id}")

    def tell(self, event: Event, detail: str = "", data: Mapping[str, Any] | None = None) -> None:
        """Announce an event of this kernel."""
        self._announcer.tell(KernelEvent(event=event, detail=detail, data=data or {}))
