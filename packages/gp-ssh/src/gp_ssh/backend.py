"""Kernels on hosts: choose one, start the launcher there, and look after it while nobody else tells."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import signal as signals
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gp_core import (
    Backend,
    BackendError,
    ConfigError,
    Environment,
    Finding,
    Handle,
    Host,
    LaunchDenied,
    LaunchFailed,
    LaunchRequest,
    Reason,
    RemoteProvisioner,
    State,
    Status,
    hookimpl,
)
from gp_core.balancing import select, wants_kernels, wants_load
from gp_core.plugins import plugins
from gp_core.server import KernelServer
from gp_core.store import file_name
from gp_core.trial import trial_listener
from gp_launchers.options import addresses

from .checks import checked_host
from .connection import NOT_ADMITTED, ConnectionFailed
from .host import RemoteHost, ask_all, known, load_of
from .hosts import USER, Client, Entry, entries
from .limits import limited
from .options import SshOptions

ENDED = Reason("LauncherEnded", "Read the kernel's log (jupyter gp logs); a host that was rebooted loses its kernels.")
NO_HOST = Reason("NoHost", "Every host of this kernelspec failed; what each of them said is above.")

USERNAME = "{username}"  # in remote_user
PLACE = ("host", "login", "user")  # of a handle
SOON = 5.0  # seconds for a host to say whether others' kernels run


class SshProvisioner(RemoteProvisioner):
    """Selected by ``"provisioner_name": "distributed-provisioner"``."""

    backend_name = "ssh"


class SshBackend(SshOptions, Backend):
    """Kernels on a set of hosts."""

    name = "ssh"
    impersonates = True
    submits_launchers = "api"
    poll_interval = (0.5, 10.0)

    def kernel_command(self, argv: Sequence[str]) -> Sequence[str]:
        return limited(argv, nice=self.nice, cpu_affinity=self.cpu_affinity, memory_limit=self.memory_limit)

    async def launch(self, request: LaunchRequest) -> Handle:
        if request.submit == "script":
            raise ConfigError(f"kernel {request.kernel_id}: hosts take no submit script: remove submit")
        file_name(request.kernel_id)  # over there, too
        if (request.impersonate or USERNAME in self.remote_user) and not USER.fullmatch(request.user):
            raise LaunchDenied(f"kernel {request.kernel_id}: {request.user!r} cannot be a user of a host")
        failures: list[BackendError] = []
        able = entries(self.remote_hosts, self.host_selector)
        while able:
            entry = await self._chosen(able, request)
            try:
                handle = await self._start(entry, request)
            except BaseException as error:
                known().ledger.ended(request.kernel_id)
                if not isinstance(error, BackendError):
                    raise
                if getattr(error, "of_host", True):
                    known().ledger.failed(entry.text, time.monotonic())
                failures.append(error)
                request.progress(f"not on {entry.text}: {str(error).splitlines()[0]}")
                self.log.warning("kernel %s: %s", request.kernel_id, str(error).splitlines()[0])
                del able[entry.text]
            else:
                known().ledger.ok(entry.text)
                return handle
        typed = [error for error in failures if isinstance(error, ConnectionFailed)]
        if len(typed) == len(failures) and (len(typed) == 1 or _say_the_same_of_the_user(typed)):
            raise typed[0].as_failure(request.kernel_id)
        text = f"kernel {request.kernel_id} found no host to run on"
        raise LaunchFailed(text, reason=NO_HOST, log="\n".join(map(str, failures)))

    async def _chosen(self, able: Mapping[str, Entry], request: LaunchRequest) -> Entry:
        algorithm, ledger = self.load_balancing_algorithm, known().ledger
        others = await self._others() if wants_kernels(algorithm) else Counter[str]()
        hosts = [Host(entry.text, entry.weight, others[entry.text]) for entry in able.values()]
        if wants_load(algorithm):
            places = (self._place(entry, request.user) for entry in able.values())
            loads = await asyncio.gather(*(load_of(self._host_of(place)) for place in places))
            hosts = [replace(host, load=load) for host, load in zip(hosts, loads, strict=True)]
        return able[select(algorithm, hosts, request, ledger, now=time.monotonic(), ask=plugins().select_host)]

    async def _others(self) -> Counter[str]:
        """Count kernels by host that are not this process's: of other servers, or of one that was here before."""
        handles = [handle for handle in await self.recorded() if handle["kernel_id"] not in known().ledger]
        looks = (asyncio.wait_for(self.look(handle), SOON) for handle in handles)
        seen = await asyncio.gather(*looks, return_exceptions=True)  # no answer: it may run
        ended = (isinstance(status, Status) and status.state is State.GONE for status in seen)
        return Counter(handle["host"] for handle, over in zip(handles, ended, strict=True) if not over)

    async def _start(self, entry: Entry, request: LaunchRequest) -> Handle:
        handle: Handle = {"kernel_id": request.kernel_id, **self._place(entry, request.user)}
        by_name = "login" in handle and USERNAME in self.remote_user
        if request.impersonate and not by_name:
            handle["user"] = request.user  # by sudo, which may refuse, even if it is who logs in
        host = await self._host_of(handle)
        first = ""
        try:
            if await self._calls_through_ssh(host, request):
                handle["forward"] = await host.forward(request.listener, request.kernel_id)
                first = f"127.0.0.1:{handle['forward']}"
            handle["note"] = await host.start(
                request,
                self.kernel_command(request.argv),
                self.installation,
                dial_first=first,
                own_choice=request.impersonate or by_name,
            )
            return handle
        except BaseException as error:
            host.release(request.kernel_id)
            if isinstance(error, ConnectionFailed) and error.reason is NOT_ADMITTED and by_name:
                error.of_host = False  # others are let in
            raise

    async def _calls_through_ssh(self, host: RemoteHost, request: LaunchRequest) -> bool:
        if not request.wrapped:
            return False  # a launcher that comes with the kernelspec knows one address
        if self.callback != "auto":
            return bool(self.callback == "ssh")
        return not await host.reaches(addresses(request.response_address))

    async def adopt(self, handle: Handle, listener: tuple[str, int]) -> None:
        known().ledger.started(handle["host"], handle["kernel_id"])
        if "forward" in handle:  # the port that its launcher knows
            await (await self._host_of(handle)).forward(listener, handle["kernel_id"], handle["forward"])

    async def status(self, handle: Handle) -> Status:
        host = await self._host_of(handle)
        if await host.runs(handle["note"]):
            return Status(state=State.RUNNING, host=host.line.target.hostname)
        self._forget(host, handle)
        return Status(state=State.GONE, reason=ENDED, detail=f"its launcher does not run on {handle['host']} any more")

    async def signal(self, handle: Handle, signum: int) -> bool:
        if signum == signals.SIGKILL:
            return False  # it would end the launcher only; terminate does both
        await self._kill(handle, signum)
        return True

    async def terminate(self, handle: Handle, *, force: bool) -> None:
        self._forget(await self._host_of(handle), handle)  # first: the host may not answer any more
        await self._kill(handle, signals.SIGKILL if force else signals.SIGTERM)

    @staticmethod
    def _forget(host: RemoteHost, handle: Handle) -> None:
        known().ledger.ended(handle["kernel_id"])
        host.release(handle["kernel_id"])

    async def _kill(self, handle: Handle, signum: int) -> None:
        await (await self._host_of(handle)).kill(handle["note"], int(signum))

    async def logs(self, handle: Handle, *, tail: int = 50) -> str:
        asked = {"installation": self.installation, "kernel_id": file_name(handle["kernel_id"]), "tail": tail}
        if "host" in handle:
            return str((await (await self._host_of(handle)).ask("logs", asked))["text"])
        return "".join(answer["text"] for _, answer in await self._ask_everywhere("logs", asked))

    async def discover(self, kernel_id: str | None = None) -> list[Handle]:
        return [
            {**place, "kernel_id": note["kernel_id"], "note": note}
            for place, answer in await self._ask_everywhere("discover", {"installation": self.installation})
            for note in answer["notes"]
            if kernel_id in (None, note["kernel_id"])
        ]

    async def environments(self, where: str) -> list[Environment]:
        found = await (await self._host_of(self._place(Entry.read(where), getpass.getuser()))).environments()
        return [Environment.read(one, config={"remote_hosts": [where]}) for one in found]

    async def check(self) -> list[Finding]:
        try:
            every = entries(self.remote_hosts, {})
        except ConfigError as error:
            return [Finding(ok=False, subject="ssh", text=str(error), advice="set GP_REMOTE_HOSTS")]
        with contextlib.ExitStack() as stack:
            server: KernelServer | None = None
            with contextlib.suppress(ConfigError):  # a finding of doctor's own
                server = stack.enter_context(trial_listener(KernelServer(self.config)))
            places = {name: self._place(entry, getpass.getuser()) for name, entry in every.items()}
            visits = (checked_host(name, self._host_of(at), self.callback, server) for name, at in places.items())
            return list(await asyncio.gather(*visits))

    # -- hosts

    async def _host(self, entry: Entry, user: str = "") -> RemoteHost:
        client = Client(self.ssh_config, self.connector, self.password_file, self.password_env)
        return await known().host(entry, client, self.remote_python, user)

    async def _host_of(self, handle: Handle) -> RemoteHost:
        named = {one.text: one for one in map(Entry.read, self.remote_hosts)}
        entry = named.get(handle["host"]) or Entry.read(handle["host"])
        return await self._host(replace(entry, user=handle.get("login", entry.user)), handle.get("user", ""))

    def _place(self, entry: Entry, user: str) -> Handle:
        """Return where a kernel of a user is, in the words of handles: a host, and whom to log in as."""
        if entry.user is not None or not self.remote_user:
            return {"host": entry.text}
        return {"host": entry.text, "login": self.remote_user.replace(USERNAME, user)}

    async def _ask_everywhere(self, question: str, asked: Mapping[str, Any]) -> list[tuple[Handle, dict[str, Any]]]:
        """Ask every host, as everybody that a kernel is recorded of; if none answers that is an error."""
        own = [] if USERNAME in self.remote_user else [self._place(Entry.read(one), "") for one in self.remote_hosts]
        users = [{name: handle[name] for name in PLACE if name in handle} for handle in await self.recorded()]
        places = {tuple(place.items()): place for place in (*own, *users)}.values()
        return await ask_all([(place, self._host_of(place)) for place in places], question, asked)


def _say_the_same_of_the_user(failures: Sequence[ConnectionFailed]) -> bool:
    return len({error.reason for error in failures}) == 1 and not any(error.of_host for error in failures)


@hookimpl
def gp_backends() -> Iterable[type[Backend]]:
    """Offer kernels over ssh."""
    return [SshBackend]
