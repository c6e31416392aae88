"""What all kernels of this process share: the process's options, the store, the listener, the kernels themselves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pwd
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from jupyter_core.paths import jupyter_data_dir
from traitlets import Bool, Int, List, Unicode
from traitlets.config import Config, LoggingConfigurable

from gp_launchers import bundle

from . import protocol
from .backend import State
from .errors import CALLBACK_PORT_TAKEN, OWNED, ConfigError, GPError, LaunchDenied, LaunchFailed
from .gate import Gate
from .identity import Identity
from .plugins import plugins
from .policies import Policy, check_limit
from .protocol import Hello, Message
from .protocol1 import Protocol1
from .rendezvous import Kernel, Rendezvous, own_addresses
from .runtime import runtime
from .settings import from_env
from .store import FileStore, Owner, Record, Store

if TYPE_CHECKING:
    from .kernel import RemoteKernel

log = logging.getLogger(__name__)


def data_folder() -> Path:
    """Folder of this installation's key and records: ``GP_DATA_DIR``, or ``gp`` in Jupyter's data folder."""
    return Path(os.environ.get("GP_DATA_DIR") or Path(jupyter_data_dir()) / "gp")


class KernelServer(LoggingConfigurable):
    """Options of the process and what it shares among its kernels; never configurable from kernel.json."""

    response_ip = from_env(
        Unicode(help="Addresses that launchers call back to, separated by commas. Default: this machine's own."),
        "GP_RESPONSE_IP",
    )
    bind_ip = from_env(
        Unicode(help="What the listener binds. Default: every interface, or the loopback if all backends run here."),
        "GP_BIND_IP",
    )
    response_port = from_env(Int(8877, min=0, max=65535, help="Port of the listener; 0: any."), "GP_RESPONSE_PORT")
    response_port_retries = from_env(
        Int(10, min=0, help="How many following ports are tried when it is taken."), "GP_RESPONSE_PORT_RETRIES"
    )
    response_addr_any = from_env(
        Bool(False, help="Bind every interface (an older name for bind_ip)."), "GP_RESPONSE_ADDR_ANY"
    )
    prohibited_local_ips = from_env(
        List(Unicode(), help="Patterns of own addresses never to advertise, such as 172.17.*."),
        "GP_PROHIBITED_LOCAL_IPS",
    )
    allow_protocol_1 = from_env(
        Bool(False, help='Serve launchers of kernelspecs that say "launcher_protocol": 1.'), "GP_ALLOW_PROTOCOL_1"
    )
    user_source = from_env(
        Unicode(
            "os", help='Who the user is: "os", "env:NAME", or "client" (KERNEL_USERNAME; only for trusted callers).'
        ),
        "GP_USER_SOURCE",
    )

    def __init__(self, config: Config | None = None, store: Store | None = None) -> None:
        super().__init__(config=config or Config())
        self.store: Store = store or FileStore(data_folder() / "kernels")
        self.owner = Owner.me()
        self.kernels: dict[str, RemoteKernel] = {}
        self.identity: Identity | None = None
        self.rendezvous: Rendezvous | None = None
        self.launcher_file = Path()
        self.own_user = ""  #: name of the user that this process runs as
        self.port = 0
        self.gate = Gate()
        self._opening: asyncio.Lock | None = None
        self._leases = asyncio.Lock()  # held while the owner of a kernel changes
        self.protocol1: Protocol1 | None = None

    @property
    def is_open(self) -> bool:
        """Whether the listener is open; from any thread."""
        return self.rendezvous is not None

    async def open(self) -> None:
        """Open the listener, once; runs on the runtime's loop."""
        self._opening = self._opening or asyncio.Lock()
        async with self._opening:
            if self.rendezvous is not None:
                return
            self.identity = await runtime().blocking(Identity.load, data_folder())
            self.launcher_file = await runtime().blocking(_launcher_file, data_folder())
            self.own_user = await runtime().blocking(own_user)  # a directory service may be slow
            made = Rendezvous(self.identity.context(), self._doorkeeper, self._hand_over)
            bound = self.bind_addresses()
            try:
                self.port = await made.listen(bound, self.response_port, self.response_port_retries)
            except ConfigError:
                if bound != ["127.0.0.1"]:
                    raise  # a firewall may have to know the port
                self.port = await made.listen(bound, 0, 0)  # twelve users of one machine, say
            self.rendezvous = made
            told = ", ".join(self.addresses(local=False))
            level = logging.DEBUG if bound == ["127.0.0.1"] else logging.INFO  # an open port is worth a line
            self.log.log(level, "listening on %s port %d; launchers call back to %s", ", ".join(bound), self.port, told)
            runtime().spawn(self._tidy(), name="tidying up")
            runtime().at_exit.append(self._farewell)

    async def open_protocol_1(self) -> None:
        """Be ready for launchers of protocol 1, on the same listener; runs on the runtime's loop.

        Raises:
            LaunchDenied: The operator does not allow it.
        """
        if not self.allow_protocol_1:
            raise LaunchDenied(
                'the kernelspec says "launcher_protocol": 1, which this server does not speak: its operator may '
                "allow it by GP_ALLOW_PROTOCOL_1=1 (KernelServer.allow_protocol_1); "
                "or make a new one by jupyter gp install --from"
            )
        await self.open()
        assert self._opening is not None
        async with self._opening:
            self.protocol1 = self.protocol1 or await Protocol1.open()

    def ipv4_address(self, *, local: bool) -> str:
        """Return the one address that launchers of protocol 1 are told, which know neither IPv6 nor a second one.

        Raises:
            ConfigError: There is none.
        """
        for address in self.addresses(local=local):
            if not address.startswith("["):
                return address
        raise ConfigError("launchers of protocol 1 need an IPv4 address to call back to: set GP_RESPONSE_IP to one")

    def bind_addresses(self) -> list[str]:
        """Return what the listener binds."""
        if self.bind_ip:
            return [ip.strip() for ip in self.bind_ip.split(",")]
        if not self.response_addr_any and all(backend.runs_here for backend in plugins().backends.values()):
            return ["127.0.0.1"]  # nobody else has to call
        return ["0.0.0.0", "::"] if _has_ipv6() else ["0.0.0.0"]

    def addresses(self, *, local: bool) -> list[str]:
        """Return what launchers are told to dial, as ``host:port``.

        Args:
            local: The launcher runs on this machine.
        """
        bound = self.bind_addresses()
        if local and {"0.0.0.0", "127.0.0.1"} & set(bound):
            hosts = ["127.0.0.1"]
        elif self.response_ip:
            hosts = [ip.strip() for ip in self.response_ip.split(",")]
        elif not {"0.0.0.0", "::"} & set(bound):
            hosts = bound
        else:
            hosts = own_addresses(self.prohibited_local_ips, six="::" in bound) or ["127.0.0.1"]
        return [f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}" for host in hosts]

    @property
    def listener(self) -> tuple[str, int]:
        """Host and port of the listener, for connections of this machine."""
        bound = self.bind_addresses()
        here = [host for host, any_of in (("127.0.0.1", "0.0.0.0"), ("::1", "::")) if {host, any_of} & set(bound)]
        return (here or bound)[0], self.port

    @property
    def pins(self) -> str:
        """What launchers recognise the server by; opens nothing."""
        assert self.identity is not None
        return ",".join(self.identity.pins)

    async def admit(self, kernel: RemoteKernel, policy: Policy) -> None:
        """Take a new kernel in, if its user may have one more.

        Raises:
            LaunchDenied: The user has as many as allowed.
        """
        user = kernel.info.user
        if policy.max_kernels_per_user is not None:
            records = await runtime().blocking(self.store.list)
            # those of servers that are gone do not count: nobody could stop them
            others = {record.kernel_id for record in records if record.user == user and record.is_owned}
            mine = {known.info.kernel_id for known in self.kernels.values() if known.info.user == user}
            check_limit(policy, user, len((others | mine) - {kernel.info.kernel_id}))
        self.kernels[kernel.info.kernel_id] = kernel  # at once: starts that come together see each other

    async def take(self, record: Record, user: object | None = None) -> RemoteKernel | None:
        """Become the owner of a kernel whose server is gone.

        Args:
            record: The kernel's, as it was read.
            user: Stands for the manager of this process that wants it, alone; None: it is only kept alive.

        Returns:
            The kernel; it may be kept by this process already. None if there is no record any more.

        Raises:
            LaunchFailed: It belongs to another server that lives or to another manager of this process, or one of its
                endpoints is taken.
            PluginError: Its backend is not installed.
        """
        from .kernel import RemoteKernel

        async with self._leases:
            kernel = self.kernels.get(record.kernel_id)
            if kernel is None:
                kernel = RemoteKernel.of_record(self, record)  # first: what cannot be served is not taken
                taken = await runtime().blocking(self.store.take, record.kernel_id, self.owner)
                if taken is None:
                    return None
                if taken.owner != self.owner:
                    raise owned(taken)
                kernel.record, kernel.inherited = taken, True
                if taken.channels == "relay":  # before its launcher is let in: clients wait for them
                    try:
                        await kernel.open_relay()
                    except BaseException:
                        await kernel.disown(record)
                        raise
                self.kernels[record.kernel_id] = kernel
            if user is not None and kernel.user is not None:
                raise owned(kernel.record)
            kernel.user = kernel.user or user
            return kernel

    async def give_back(self, former: Record, user: object) -> None:
        """Undo a `take` that came to nothing, if it did not already; a kernel whose launcher is connected is kept.

        Args:
            former: The record before.
            user: Who took it.
        """
        async with self._leases:
            kernel = self.kernels.get(former.kernel_id)
            if kernel is None or kernel.user is not user:
                return
            kernel.user = None
            if kernel.session is None and former.owner != self.owner:
                del self.kernels[former.kernel_id]
                await kernel.disown(former)

    async def listen_at(self, kernel_id: str, bind: str) -> None:
        """Open the ports that a launcher of a former server calls back to.

        Args:
            kernel_id: The launcher's kernel, for the error.
            bind: Its ``host:port``, several separated by commas.

        Raises:
            LaunchFailed: A port is taken by another process.
        """
        assert self.rendezvous is not None
        assert self._opening is not None
        hosts = self.bind_addresses()
        async with self._opening:
            for port in {int(address.rpartition(":")[2]) for address in bind.split(",") if address}:
                try:
                    await self.rendezvous.listen_also(hosts, port)
                except OSError as error:
                    holder = await runtime().blocking(_listener, port)
                    raise LaunchFailed(
                        f"kernel {kernel_id} cannot be taken over: its launcher calls back to {bind}, and this server "
                        f"cannot listen on port {port} of {', '.join(hosts)}: {error.strerror or error}{holder}",
                        reason=CALLBACK_PORT_TAKEN,
                    ) from None

    def _hand_over(self, transport: asyncio.Transport, data: bytes) -> bool:
        return self.protocol1.hand_over(transport, data) if self.protocol1 else False

    async def _doorkeeper(self, hello: Hello) -> Kernel | Message:
        kernel = self.kernels.get(hello.kernel_id)
        record = kernel.record if kernel else await runtime().blocking(self._recorded, hello.kernel_id)
        if record is None:
            return protocol.refused("unknown_kernel", "no such kernel is known here", final=True)
        if not protocol.matches(hello.token, record.token):
            return protocol.refused("bad_token", "the launch token is wrong", final=True)
        if record.secret is not None and not protocol.matches(hello.secret, record.secret):
            return protocol.refused("bad_token", "the launch token was used by another launcher", final=True)
        if kernel is not None:
            return kernel
        if record.is_owned:
            return protocol.refused("not_here", "the kernel belongs to another server", final=False)
        # kept alive, until somebody uses it
        kept = await self.take(record)
        if kept is None:
            return protocol.refused("unknown_kernel", "no such kernel is known here", final=True)
        self.log.info("kernel %s of a server that is gone has called back and is kept", record.kernel_id)
        return kept

    def _recorded(self, kernel_id: str) -> Record | None:
        try:
            return self.store.get(kernel_id)
        except Exception as error:
            log.warning("hello for a kernel whose record cannot be read: %s", error)
            return None

    async def _tidy(self) -> None:
        """Forget kernels of servers that are gone if their jobs are gone too."""
        from .kernel import RemoteKernel

        await runtime().blocking(self.store.sweep)
        for record in await runtime().blocking(self.store.list):
            if record.owner is None or record.is_owned or record.handle is None:
                continue
            try:
                status = await RemoteKernel.of_record(self, record).backend.look(record.handle)
            except GPError:
                continue  # its backend is not installed any more: `jupyter gp doctor` and `gc` tell
            if status.state is State.GONE:
                await self._forget(record.kernel_id)

    async def _forget(self, kernel_id: str) -> None:
        async with self._leases:
            if kernel_id in self.kernels:
                return
            taken = await runtime().blocking(self.store.take, kernel_id, self.owner)
            if taken is not None and taken.owner == self.owner:  # else another server is just starting it anew
                self.log.debug("kernel %s ended without its server: its record is removed", kernel_id)
                await runtime().blocking(self.store.remove, kernel_id)

    async def _farewell(self) -> None:
        """At the end of the process: forget kernels that a client has just shut down without telling (console)."""
        await asyncio.gather(*(kernel.farewell() for kernel in list(self.kernels.values())), return_exceptions=True)


def own_user() -> str:
    """Return the name of the server's own user; not from the environment, as `getpass.getuser` does."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid-{os.getuid()}"  # containers run as users without a name


def _launcher_file(folder: Path) -> Path:
    """Return the launcher as one file; named by its contents, because an update must not go on with the old one."""
    path = folder / f"gp-launcher-{bundle.fingerprint()}.pyz"
    if not path.exists():
        bundle.build(path)
    return path


def owned(record: Record) -> LaunchFailed:
    """Return the error for a kernel that belongs to somebody who lives."""
    who = "another manager of this process" if record.owner == Owner.me() else "a server that runs"
    text = f"kernel {record.kernel_id} ({record.kernel_name}) belongs to {who}: {record.owner}"
    return LaunchFailed(text, reason=OWNED)


def _listener(port: int) -> str:
    """Say who listens on a port of this machine, if that is to be seen."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.pid and tuple(connection.laddr)[1:2] == (port,):
                return f" (pid {connection.pid}, {psutil.Process(connection.pid).name()}, listens there)"
    return ""


def _has_ipv6() -> bool:
    import socket

    return socket.has_ipv6 and os.path.exists("/proc/net/if_inet6")


_server: tuple[int, KernelServer] | None = None
_lock = threading.Lock()  # managers of several threads may be the first together


def kernel_server(config: Config | None = None) -> KernelServer:
    """Return this process's server, made from the first caller's configuration; a forked child gets its own.

    Args:
        config: Of the host application.
    """
    global _server, _lock
    if _server is not None and _server[0] != os.getpid():
        _server, _lock = None, threading.Lock()  # a fork may have copied it locked
    with _lock:
        if _server is None:
            _server = (os.getpid(), KernelServer(config))
        return _server[1]
