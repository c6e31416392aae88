"""Kernels in containers of one engine: create, look after, end."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal as signals
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from gp_core import (
    Backend,
    BackendError,
    ConfigError,
    Environment,
    Finding,
    Handle,
    LaunchFailed,
    LaunchRequest,
    RemoteProvisioner,
    State,
    Status,
    blocking,
    hookimpl,
)
from gp_core.runtime import runtime
from gp_core.server import KernelServer

from . import container, states
from .checks import checked_engine
from .engine import Engine, engine, last_of
from .images import accounts, checked_reference, present
from .on_engine import OnEngine
from .options import DockerOptions
from .reasons import Refused
from .throwaway import kernels_of

if TYPE_CHECKING:
    from docker import APIClient

RELOOK = 10.0  # seconds until a container is looked at without an event: a silent engine may have lost some
CLEARED = 10.0  # seconds for a container that has ended to make room for the next one of its kernel
BUSY = 120.0  # seconds for what an engine may need long for, as when fifty containers start at once


class DockerProvisioner(RemoteProvisioner):
    """Selected by ``"provisioner_name": "docker-provisioner"``."""

    backend_name = "docker"


class DockerBackend(DockerOptions, OnEngine):
    """Kernels on one engine."""

    name = "docker"

    async def launch_image(self, where: Engine, name: str, request: LaunchRequest) -> Handle:
        config = container.host_config(self, request)
        image = await present(
            where,
            name,
            policy=self.pull_policy,
            platform=self.platform,
            timeout=self.pull_timeout,
            kernel_id=request.kernel_id,
            progress=request.progress,
        )
        user = container.user_of(self, image, await accounts(where, image), request)
        if user.note:
            request.progress(user.note)
            self.log.info("kernel %s: %s", request.kernel_id, user.note)
        first = await self._dial_first(where, request.listener[1])
        ours = [f"--secrets-file={container.SECRETS}", f"--runtime-dir={container.OWN}"]
        command = container.command_of(self, request, ours=ours, launcher=container.LAUNCHER, dial_first=first)
        nonce = secrets.token_hex(8)
        body = {
            **container.started_by(command, self),
            "image": image.id,
            "name": container.name_of(request),
            "hostname": None,
            "user": str(user),
            "environment": container.environment_of(self, image, user),
            "labels": {
                **container.labels_of(self, request, self.installation),
                **({} if self.remove_container else {"gp.keep": "yes"}),
                "gp.image": image.name,  # docker ps shows the number
                "gp.launch": nonce,
            },
            "working_dir": self.working_dir or None,
            "platform": self.platform or None,
            "stop_signal": "SIGTERM",
            "healthcheck": {"test": ["NONE"]},  # of the service that the image is for
        }
        volumes = [container.BASE] if self.read_only else []

        def create(client: APIClient) -> str:
            return str(
                client.create_container(**body, volumes=volumes, host_config=client.create_host_config(**config))["Id"]
            )

        try:
            made = await self._created(where, request, str(body["name"]), create)
            await self._start(where, request, made, user, mounts=bool(config.get("binds")))
        except BaseException:
            # in the background: the engine may have died just now, and its answer with it
            runtime().spawn(where.remove_all(f"gp.launch={nonce}"), name=f"clean-up of kernel {request.kernel_id}")
            raise
        return {
            "kernel_id": request.kernel_id,
            "engine": where.where.name,
            "container": made,
            "image": image.name,
            "digest": image.digest,
        }

    async def _created(
        self, where: Engine, request: LaunchRequest, name: str, create: Callable[[APIClient], str]
    ) -> str:
        deadline = time.monotonic() + CLEARED
        while True:
            try:
                return await where.do(create, patience=BUSY, undo=_removed)
            except Refused as error:
                former = error.status == 409 and time.monotonic() < deadline and await self._ended(where, request, name)
                if not former:
                    raise error.as_failure(request.kernel_id, "create the container") from None
                await where.remove(name)
                await asyncio.sleep(0.05)

    async def _ended(self, where: Engine, request: LaunchRequest, name: str) -> bool:
        """Whether a name is that of an ended container of the same kernel: clients may choose ids, and so names."""
        try:
            told = await where.do(lambda client: client.inspect_container(name))
        except Refused as error:
            return error.status == 404  # it has gone meanwhile
        labels = told["Config"].get("Labels") or {}
        ours = (labels.get("kernel_id"), labels.get("gp.installation")) == (request.kernel_id, self.installation)
        return ours and states.status_of(told).state is State.GONE

    async def _start(
        self, where: Engine, request: LaunchRequest, made: str, user: container.User, *, mounts: bool
    ) -> None:
        below = container.BASE if self.read_only else ""
        data = await blocking(container.files, request, user, below=below)

        def start(client: APIClient) -> None:
            if mounts and _has(client, made, container.OWN):  # by a link of the image: its owner would be changed
                said = f"something is mounted at {container.OWN}, where the launcher is put, or the image has it"
                raise Refused(400, said)
            client.put_archive(made, below or "/", data)
            for network in self.networks[1:]:
                client.connect_container_to_network(made, network)
            client.start(made)

        await self._done(where, request, "start the container", start)
        request.progress(f"container {made[:12]} on {where}")

    async def _done(self, where: Engine, request: LaunchRequest, what: str, work: Any) -> Any:
        try:
            return await where.do(work, patience=BUSY)
        except Refused as error:
            raise error.as_failure(request.kernel_id, what) from None

    async def _dial_first(self, where: Engine, port: int) -> str:
        """Return the address of this machine that containers reach best; empty: nobody knows."""
        host = ""
        network = self.networks[0] if self.networks else "bridge"
        if network == "host":
            host = "127.0.0.1"
        elif where.where.is_local:
            with contextlib.suppress(BackendError):
                host = await where.cached(
                    ("gateway", network), lambda: where.do(lambda client: _gateway(client, network))
                )
        elif where.where.host:
            with contextlib.suppress(OSError):
                host = await where.cached("own address", lambda: blocking(_own_address, where.where.host))
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}" if host else ""

    # -- what runs

    async def status(self, handle: Handle) -> Status:
        return await (await self.engine_of(handle)).status(self._container(handle))

    async def watch(self, handle: Handle) -> AsyncIterator[Status]:
        """Look whenever the engine tells of an event of the container."""
        where, last = await self.engine_of(handle), None
        async with where.changes(self._container(handle)) as changes:
            while True:
                changes.clear()  # first: what happens while it is looked at counts
                status = await self.look(handle)
                if status != last:
                    yield status
                if status.state is State.GONE:
                    return
                last = status
                await changes.next(RELOOK)

    async def signal(self, handle: Handle, signum: int) -> bool:
        if signum == signals.SIGKILL:
            return False  # terminate removes the container besides
        await self._kill(handle, signum)
        return True

    async def terminate(self, handle: Handle, *, force: bool) -> None:
        where, made = await self.engine_of(handle), self._container(handle)
        status = await where.status(made) if force else await self._stopped(where, handle)
        if status.state is State.GONE and not self.remove_container:
            return
        if force or status.state is not State.RUNNING or status.detail:  # one that is paused hears nothing
            await where.remove(made)

    async def _stopped(self, where: Engine, handle: Handle) -> Status:
        made, asked = self._container(handle), False
        async with where.changes(made) as changes:
            deadline = time.monotonic() + self.stop_timeout
            while True:
                changes.clear()
                status = await where.status(made)
                if status.state is not State.RUNNING or status.detail or (asked and time.monotonic() > deadline):
                    return status
                if not asked:
                    asked = True
                    await self._kill(handle, signals.SIGTERM)
                await changes.next(max(0.01, deadline - time.monotonic()))

    async def _kill(self, handle: Handle, signum: int) -> None:
        where, made = await self.engine_of(handle), self._container(handle)
        try:
            await where.do(lambda client: client.kill(made, int(signum)))
        except Refused as error:
            if error.status not in (404, 409):  # 409: it does not run
                raise

    async def logs(self, handle: Handle, *, tail: int = 50) -> str:
        where = await self.engine_of(handle)
        if "container" not in handle:
            found = await self.discover(handle["kernel_id"])
            if not found:
                return ""
            handle = found[0]
        made = handle["container"]
        try:
            return await where.do(lambda client: last_of(client.logs(made, tail=tail, stream=True, follow=False)))
        except Refused as error:
            if error.status in (404, 409, 501):  # 501: its log driver cannot be read
                return ""
            raise

    async def discover(self, kernel_id: str | None = None) -> list[Handle]:
        where = await engine(self.engine)
        labels = [f"kernel_id={kernel_id}" if kernel_id else "kernel_id"]
        if kernel_id is None and not self.installation:
            return []  # one that has never started a kernel: it has none, and what has no label is others'
        told = await where.do(lambda client: client.containers(all=True, filters={"label": labels}))
        return [
            {
                "kernel_id": one["Labels"]["kernel_id"],
                "engine": where.where.name,
                "container": one["Id"],
                "image": one["Image"],
                **({"keep": True} if "gp.keep" in one["Labels"] else {}),
            }
            for one in told
            # a submit script knows nothing of installations
            if one["Labels"].get("gp.installation", self.installation if kernel_id else "") == self.installation
        ]

    async def environments(self, where: str) -> list[Environment]:
        at, name = await engine(self.engine), checked_reference(where)
        try:
            await present(
                at,
                name,
                policy=self.pull_policy,
                platform=self.platform,
                timeout=self.pull_timeout,
                kernel_id="none",
                progress=self.log.info,
            )
        except LaunchFailed as error:
            raise BackendError(str(error)) from None
        return await kernels_of(at, name, self)

    async def check(self) -> list[Finding]:
        try:
            where = await engine(self.engine)
            return await checked_engine(where, self, KernelServer(self.config), self._dial_first)
        except (BackendError, ConfigError) as error:
            advice = "start the engine, or correct DOCKER_HOST or the docker context"
            return [Finding(ok=False, subject="docker engine", text=str(error), advice=advice)]

    # -- parts

    @staticmethod
    def _container(handle: Handle) -> str:
        return str(handle.get("container") or f"kernel-{handle['kernel_id']}")


def _removed(client: APIClient, made: str) -> None:
    client.remove_container(made, v=True, force=True)


def _has(client: APIClient, made: str, path: str) -> bool:
    from docker.errors import NotFound

    try:
        pieces, _ = client.get_archive(made, path)
    except NotFound:
        return False
    pieces.close()
    return True


def _gateway(client: APIClient, network: str) -> str:
    settings: Iterable[Mapping[str, str]] = client.inspect_network(network)["IPAM"].get("Config") or ()
    return next((one["Gateway"] for one in settings if one.get("Gateway")), "")


def _own_address(host: str) -> str:
    """Return the address of this machine that leads to another one; sends nothing."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


@hookimpl
def gp_backends() -> Iterable[type[Backend]]:
    """Offer kernels in containers."""
    return [DockerBackend]
