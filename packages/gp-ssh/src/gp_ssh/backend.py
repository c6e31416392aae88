"""Kernels on hosts: choose one, start the launcher there, and look after it while nobody else tells."""

from __future__ import annotations

import asyncio
import signal as signals
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from traitlets import CaselessStrEnum, Dict, Int, List, Unicode, Union

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
    from_env,
    hookimpl,
)
from gp_core.balancing import select, wants_load
from gp_core.plugins import plugins
from gp_core.store import file_name
from gp_launchers.options import addresses

from .connection import ConnectionFailed
from .host import RemoteHost, ask_all, known, load_of
from .hosts import USER, Client, Entry, entries
from .limits import limited

ENDED = Reason("LauncherEnded", "Read the kernel's log (jupyter gp logs); a host that was rebooted loses its kernels.")
NO_HOST = Reason("NoHost", "Every host of this kernelspec failed; what each of them said is above.")


class SshProvisioner(RemoteProvisioner):
    """Selected by ``"provisioner_name": "distributed-provisioner"``."""

    backend_name = "ssh"


class SshBackend(Backend):
    """Kernels on a set of hosts."""

    name = "ssh"
    impersonates = True
    submits_launchers = "api"
    poll_interval = (0.5, 10.0)

    remote_hosts = from_env(
        List(Union([Unicode(), Dict()]), help="Each a host, user@host:port, or {host, weight, labels}."),
        "GP_REMOTE_HOSTS",
    )
    host_selector = Dict(help="Labels that a host must have to be chosen, such as {'gpu': 'a100'}.").tag(config=True)
    load_balancing_algorithm = from_env(
        Unicode(
            "round-robin",
            help="Which host is next: round-robin, least-connection, random, weighted, sticky, least-load.",
        ),
        "GP_LOAD_BALANCING_ALGORITHM",
    )
    remote_python = from_env(
        Unicode(help="Python of the hosts, 3.8 or newer, to run launchers. Default: what is found there."),
        "GP_REMOTE_PYTHON",
    )
    callback = from_env(
        CaselessStrEnum(
            ["auto", "dial", "ssh"],
            "auto",
            help="How launchers call back: by dialling the server, through ssh, or as a first visit to the host finds.",
        ),
        "GP_SSH_CALLBACK",
    )
    ssh_config = from_env(Unicode(help="Configuration of ssh. Default: the user's own."), "GP_SSH_CONFIG")
    connector = from_env(
        CaselessStrEnum(["paramiko", "ssh"], "paramiko", help="This process connects, or the user's own ssh."),
        "GP_SSH_CONNECTOR",
    )
    password_file = from_env(
        Unicode(help="File with the password of all hosts.").tag(operator=True), "GP_SSH_PASSWORD_FILE"
    )
    password_env = from_env(
        Unicode(help="Variable with the password of all hosts.").tag(operator=True), "GP_SSH_PASSWORD_ENV"
    )

    nice = Int(0, min=0, max=19, help="How far others come first on the host.").tag(config=True)
    cpu_affinity = Unicode(help="Processors that a kernel may use, such as 0-3,8. Default: all.").tag(config=True)
    memory_limit = Unicode(help="Memory that a kernel may have, such as 4Gi. Default: no limit.").tag(config=True)

    def kernel_command(self, argv: Sequence[str]) -> Sequence[str]:
        return limited(argv, nice=self.nice, cpu_affinity=self.cpu_affinity, memory_limit=self.memory_limit)

    async def launch(self, request: LaunchRequest) -> Handle:
        if request.submit == "script":
            raise ConfigError(f"kernel {request.kernel_id}: hosts take no submit script: remove submit")
        file_name(request.kernel_id)  # over there, too
        if request.impersonate and not USER.fullmatch(request.user):
            raise LaunchDenied(f"kernel {request.kernel_id}: {request.user!r} cannot be a user of a host")
        failures: list[str] = []
        able = entries(self.remote_hosts, self.host_selector)
        while able:
            entry = await self._chosen(able, request)
            try:
                handle = await self._start(entry, request)
            except BackendError as error:
                known().ledger.ended(request.kernel_id)
                if getattr(error, "of_host", True):
                    known().ledger.failed(entry.text, time.monotonic())
                failures.append(str(error))
                if len(self.remote_hosts) == 1 and isinstance(error, ConnectionFailed):
                    raise error.as_failure(request.kernel_id) from None
                request.progress(f"not on {entry.text}: {str(error).splitlines()[0]}")
                self.log.warning("kernel %s: %s", request.kernel_id, str(error).splitlines()[0])
                del able[entry.text]
            else:
                known().ledger.ok(entry.text)
                return handle
        text = f"kernel {request.kernel_id} found no host to run on"
        raise LaunchFailed(text, reason=NO_HOST, log="\n".join(failures))

    async def _chosen(self, able: Mapping[str, Entry], request: LaunchRequest) -> Entry:
        hosts = [Host(entry.text, entry.weight) for entry in able.values()]
        if wants_load(self.load_balancing_algorithm):
            loads = await asyncio.gather(*(load_of(self._host(entry)) for entry in able.values()))
            hosts = [replace(host, load=load) for host, load in zip(hosts, loads, strict=True)]
        now, ask = time.monotonic(), plugins().select_host
        return able[select(self.load_balancing_algorithm, hosts, request, known().ledger, now=now, ask=ask)]

    async def _start(self, entry: Entry, request: LaunchRequest) -> Handle:
        user = request.user if request.impersonate else ""
        host = await self._host(entry, user)
        handle: Handle = {"kernel_id": request.kernel_id, "host": entry.text, "user": user}
        first = ""
        try:
            if await self._calls_through_ssh(host, request):
                handle["forward"] = await host.forward(request.listener, request.kernel_id)
                first = f"127.0.0.1:{handle['forward']}"
            handle["note"] = await host.start(request, self.kernel_command(request.argv), self.installation, first)
            return handle
        except BaseException:
            host.release(request.kernel_id)
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
        said = await self._ask_all("logs", asked)
        return "".join(answer["text"] for answer in said.values())

    async def discover(self, kernel_id: str | None = None) -> list[Handle]:
        said = await self._ask_all("discover", {"installation": self.installation})
        return [
            {"kernel_id": note["kernel_id"], "host": name, "note": note}
            for name, answer in said.items()
            for note in answer["notes"]
            if kernel_id in (None, note["kernel_id"])
        ]

    async def environments(self, where: str) -> list[Environment]:
        found = await (await self._host(Entry.read(where))).environments()
        return [Environment.read(one, config={"remote_hosts": [where]}) for one in found]

    async def check(self) -> list[Finding]:
        try:
            every = entries(self.remote_hosts, {})
        except ConfigError as error:
            return [Finding(ok=False, subject="ssh", text=str(error), advice="set GP_REMOTE_HOSTS")]
        return list(await asyncio.gather(*(self._checked_host(entry) for entry in every.values())))

    async def _checked_host(self, entry: Entry) -> Finding:
        begun, subject = time.monotonic(), f"ssh host {entry.text}"
        try:
            facts = await (await self._host(entry)).look()
        except ConnectionFailed as error:
            return Finding(ok=False, subject=subject, text=error.text, advice=error.reason.advice)
        except (BackendError, ConfigError) as error:
            return Finding(ok=False, subject=subject, text=str(error), advice="read what the host said")
        skew, took = facts.clock - time.time(), time.monotonic() - begun
        version = ".".join(map(str, facts.version))
        text = f"Python {version} at {facts.python}, {facts.free // 2**20} MiB free, clock {skew:+.1f} s, {took:.2f} s"
        return Finding(ok=True, subject=subject, text=text)

    # -- hosts

    async def _host(self, entry: Entry, user: str = "") -> RemoteHost:
        client = Client(self.ssh_config, self.connector, self.password_file, self.password_env)
        return await known().host(entry, client, self.remote_python, user)

    async def _host_of(self, handle: Handle) -> RemoteHost:
        named = {one.text: one for one in map(Entry.read, self.remote_hosts)}
        return await self._host(named.get(handle["host"]) or Entry.read(handle["host"]), handle.get("user", ""))

    async def _ask_all(self, question: str, asked: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Ask every host; those that do not answer are left out, but if none does that is an error."""
        every = {one.text: self._host(one) for one in map(Entry.read, self.remote_hosts)}
        return await ask_all(every, question, asked)


@hookimpl
def gp_backends() -> Iterable[type[Backend]]:
    """Offer kernels over ssh."""
    return [SshBackend]
