"""Kernels anywhere in a Docker Swarm: each is a service of one replica that is never started again."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from gp_core import (
    Backend,
    BackendError,
    ConfigError,
    Finding,
    Handle,
    LaunchDenied,
    LaunchRequest,
    Reason,
    RemoteProvisioner,
    State,
    Status,
    blocking,
    hookimpl,
)

from . import container, states
from .engine import Engine, engine, last_of
from .images import Accounts, Image, accounts, inspected
from .on_engine import OnEngine
from .options import SwarmOptions
from .reasons import (
    BAD_OPTION,
    CONTAINER_ENDED,
    IMAGE_NOT_FOUND,
    NOT_A_MANAGER,
    Refused,
    reason_of,
)

if TYPE_CHECKING:
    from docker import APIClient

NO_SUITABLE_NODE = Reason(
    "NoSuitableNode", "The scheduler's words say what is missing: free a node, add one, or ask for less."
)
REJECTED = Reason("Rejected", "A node took the kernel and could not start it: its own words say why.")
NODE_DOWN = Reason("NodeDown", "The kernel's node is gone, and the kernel with it: restart it, on another node.")

LAUNCHER = f"{container.BASE}/gp-launcher.pyz"
SECRET = "gp-launch"
SECRETS = f"/run/secrets/{SECRET}"

TASKS = {
    **dict.fromkeys(("new", "pending", "assigned", "accepted", "preparing", "ready", "starting"), State.PENDING),
    "running": State.RUNNING,
    **dict.fromkeys(("complete", "shutdown", "failed", "rejected", "remove", "orphaned"), State.GONE),
}
"""What a task's state means for its kernel."""


class SwarmProvisioner(RemoteProvisioner):
    """Selected by ``"provisioner_name": "docker-swarm-provisioner"``."""

    backend_name = "docker-swarm"


class SwarmBackend(SwarmOptions, OnEngine):
    """Kernels as services."""

    name = "docker-swarm"
    poll_interval = (0.2, 5.0)  # a manager tells of services by itself, and not of their tasks

    async def launch_image(self, where: Engine, name: str, request: LaunchRequest) -> Handle:
        image, users = await self._image(where, name)
        user = container.user_of(self, image, users, request)
        if user.note:
            request.progress(user.note)
        ours = [f"--secrets-file={SECRETS}"]
        command = container.command_of(self, request, ours=ours, launcher=LAUNCHER)
        env = container.environment_of(self, image, user)
        if env.get("HOME") == container.HOME:
            env["HOME"] = "/tmp"
        launcher = await blocking(request.launcher_file.read_bytes)
        spec = {"image": image.name, "command": command, "env": env, "user": user}
        mounts = self._mounts(request)
        labels = container.labels_of(self, request, self.installation)

        def create(client: APIClient) -> Handle:
            made: Handle = {"kernel_id": request.kernel_id, "engine": where.where.name}
            unique = f"gp-{request.kernel_id}-{secrets.token_hex(4)}"[:64]
            networks = [_network(client, name, request.kernel_id) for name in self.networks]
            try:
                made["config"] = client.create_config(unique, launcher, labels=labels)["ID"]
                bundle = request.secrets.get("GP_LAUNCH_SECRETS", "").encode()
                made["secret"] = client.create_secret(unique, bundle, labels=labels)["ID"]
                template = self._template(spec, labels, mounts, unique, made)
                template["Networks"] = [{"Target": network} for network in networks]
                client.reload_config()  # nodes pull with what this user has logged in with until now
                made["service"] = client.create_service(
                    template,
                    name=container.name_of(request),
                    labels=labels,
                    endpoint_spec={"Mode": "dnsrr"} if self.networks else None,
                )["ID"]
            except BaseException:
                _remove(client, made)
                raise
            return made

        try:
            handle = await where.do(create, patience=60.0, undo=_remove)
        except Refused as error:
            raise error.as_failure(request.kernel_id, "create the service", pulling=True) from None
        return {**handle, "image": image.name, "digest": image.digest}

    async def _image(self, where: Engine, name: str) -> tuple[Image, Accounts]:
        """Return what the manager knows of an image; nodes pull it for themselves."""
        try:
            image = await inspected(where, name)
            return image, await accounts(where, image)
        except Refused as error:
            if error.status != 404:
                raise BackendError(f"engine {where}: {error.said}") from None
        return Image(name, "", name, "", {}, ()), Accounts()

    def _mounts(self, request: LaunchRequest) -> list[dict[str, Any]]:
        container.check_networks(self, request.kernel_id)
        found: list[dict[str, Any]] = [
            {
                "Type": "bind" if one.is_path else "volume",
                "Source": one.source,
                "Target": one.target,
                "ReadOnly": one.read_only,
            }
            for one in container.mounts_of(self, request)
        ]
        return found + [{"Type": "tmpfs", "Target": path} for path in container.tmpfs_of(self)]

    def _template(
        self,
        spec: Mapping[str, Any],
        labels: Mapping[str, str],
        mounts: list[dict[str, Any]],
        unique: str,
        made: Handle,
    ) -> dict[str, Any]:
        user: container.User = spec["user"]

        def file(name: str, mode: int) -> dict[str, Any]:
            return {"Name": name, "UID": str(user.uid), "GID": str(user.gid), "Mode": mode}

        inside: dict[str, Any] = {
            "Image": spec["image"],
            "Command" if self.entrypoint == "replace" else "Args": list(spec["command"]),
            "Env": [f"{name}={value}" for name, value in spec["env"].items()],
            "User": str(user),
            "Labels": dict(labels),
            "Mounts": mounts,
            "StopSignal": "SIGTERM",
            "StopGracePeriod": self.stop_timeout * 10**9,
            "Healthcheck": {"Test": ["NONE"]},
            "ReadOnly": self.read_only,
            "Init": self.init,
            "Privileges": {"NoNewPrivileges": self.no_new_privileges},  # engines before 25 do not know it
            "CapabilityDrop": ["ALL"],
            "CapabilityAdd": self.capabilities,
            "Ulimits": container.ulimits_of(self),
            "Secrets": [{"SecretID": made["secret"], "SecretName": unique, "File": file(SECRET, 0o400)}],
            "Configs": [{"ConfigID": made["config"], "ConfigName": unique, "File": file(LAUNCHER, 0o444)}],
        }
        if self.working_dir:
            inside["Dir"] = self.working_dir
        limits, wanted = self._resources()
        return {
            "ContainerSpec": inside,
            "Resources": {"Limits": limits, "Reservations": wanted},
            "RestartPolicy": {"Condition": "none"},
            "Placement": self._placement(),
        }

    def _resources(self) -> tuple[dict[str, Any], dict[str, Any]]:
        cpus, memory = container.nano_cpus(self.cpus, "cpus"), self.memory
        limits: dict[str, Any] = {"NanoCPUs": cpus} if cpus else {}
        if memory:
            limits["MemoryBytes"] = container.size_of("memory", memory)
        wanted = dict(limits)
        limits["Pids"] = max(0, self.pids_limit)
        if self.reserve_cpus:
            wanted["NanoCPUs"] = container.nano_cpus(self.reserve_cpus, "reserve_cpus", least=0)
        if self.reserve_memory:
            wanted["MemoryBytes"] = container.size_of("reserve_memory", self.reserve_memory)
        if self.gpus:
            wanted["GenericResources"] = [_generic(self.gpus)]
        return limits, wanted

    def _placement(self) -> dict[str, Any]:
        found: dict[str, Any] = {"Constraints": list(self.constraints)}
        found["Preferences"] = [{"Spread": {"SpreadDescriptor": one}} for one in self.preferences]
        if self.platform:
            system, _, processor = self.platform.partition("/")
            found["Platforms"] = [{"OS": system, "Architecture": processor}]
        return found

    # -- what runs

    async def status(self, handle: Handle) -> Status:
        where = await self.engine_of(handle)
        if "service" not in handle:
            return states.gone(None)
        # by label: tasks of a service that is removed are there until they have ended
        label = f"kernel_id={handle['kernel_id']}"
        told = await where.do(lambda client: client.tasks(filters={"label": label}))
        every = [one for one in told if one.get("ServiceID") == handle["service"]]
        if not every:
            return await self._without_tasks(where, handle)
        return await self._of_task(where, max(every, key=lambda one: str(one["CreatedAt"])))

    async def _without_tasks(self, where: Engine, handle: Handle) -> Status:
        try:
            await where.do(lambda client: client.inspect_service(handle["service"]))
        except Refused as error:
            if error.status != 404:
                raise
            return Status(state=State.GONE, reason=CONTAINER_ENDED, detail="its service is gone")
        return Status(state=State.PENDING)

    async def _of_task(self, where: Engine, task: Mapping[str, Any]) -> Status:
        told, state = task["Status"], TASKS.get(task["Status"]["State"], State.UNKNOWN)
        said, node = str(told.get("Err") or ""), str(task.get("NodeID") or "")
        name, up = (
            await self._node(where, node, sure=task.get("DesiredState") in ("running", "ready")) if node else ("", True)
        )
        on = f"on node {name}" if name else ""
        if state is State.PENDING:
            waits = "no suitable node" in said
            detail = said or told["State"]
            return Status(state=state, reason=NO_SUITABLE_NODE if waits else None, detail=f"{detail} {on}".strip())
        if not up:
            return Status(state=State.GONE, reason=NODE_DOWN, detail=f"node {name} is down")
        if state is State.UNKNOWN:
            return Status(state=state, detail=f"{told['State']} {on}".strip())
        if state is State.RUNNING:
            return Status(state=state, host=_address(task), detail=on)
        code = (told.get("ContainerStatus") or {}).get("ExitCode")
        if told["State"] == "rejected":
            otherwise = IMAGE_NOT_FOUND if "image" in said.lower() else REJECTED
            return Status(
                state=State.GONE, reason=reason_of(said, otherwise, pulling=True), detail=f"{said} {on}".strip()
            )
        ended = states.gone(code, out_of_memory="OOM" in said or "out of memory" in said)
        return Status(
            state=State.GONE, exit_code=ended.exit_code, reason=ended.reason, detail=f"{ended.detail} {on}".strip()
        )

    async def _node(self, where: Engine, node: str, *, sure: bool) -> tuple[str, bool]:
        """Return a node's name and whether it is up; that is asked for only if the Swarm gives up its task."""
        known = where.known.get(("node", node))
        if sure and known is not None:
            return str(known), True
        try:
            told = await where.do(lambda client: client.inspect_node(node))
        except Refused:
            return node[:12], True
        name = where.known[("node", node)] = told["Description"]["Hostname"]
        return str(name), told["Status"]["State"] != "down"

    async def terminate(self, handle: Handle, *, force: bool) -> None:
        where = await self.engine_of(handle)
        await where.do(lambda client: _remove(client, handle), patience=60.0)

    async def logs(self, handle: Handle, *, tail: int = 50) -> str:
        where = await self.engine_of(handle)
        if "service" not in handle:
            handle = next(iter(await self.discover(handle["kernel_id"])), handle)
        if "service" not in handle:
            return ""

        def read(client: APIClient) -> str:
            return last_of(client.service_logs(handle["service"], stdout=True, stderr=True, tail=tail))

        with contextlib.suppress(Refused):  # no such service, or a log driver that cannot be read
            return await where.do(read)
        return ""

    async def discover(self, kernel_id: str | None = None) -> list[Handle]:
        where = await engine(self.engine)
        labels = [f"kernel_id={kernel_id}" if kernel_id else "kernel_id"]
        own = self.installation
        supposed = own if kernel_id else ""  # a submit script knows nothing of installations

        def ours(spec: Mapping[str, Any]) -> bool:
            return bool(spec["Labels"].get("gp.installation", supposed) == own)

        if kernel_id is None and not own:
            return []  # one that has never started a kernel: it has none, and what has no label is others'

        def ask(client: APIClient) -> list[Handle]:
            told = client.services(filters={"label": labels})
            found = [_handle(where, one["ID"], one["Spec"]) for one in told if ours(one["Spec"])]
            return found if kernel_id else [*found, *_without_service(where, client, ours, found)]

        try:
            return await where.do(ask)
        except Refused as error:
            if kernel_id is None and reason_of(error.said, BAD_OPTION) is NOT_A_MANAGER:
                return []  # whoever has only an engine has this backend, too
            raise

    async def check(self) -> list[Finding]:
        try:
            where = await engine(self.engine)
            told = (await where.do(lambda client: client.info()))["Swarm"]
        except (BackendError, ConfigError) as error:
            advice = "start the engine, or correct DOCKER_HOST or the docker context"
            return [Finding(ok=False, subject="docker swarm", text=str(error), advice=advice)]
        subject = f"docker swarm {where}"
        if told.get("LocalNodeState") == "inactive":
            return [Finding(ok=True, subject=subject, text="in no Swarm: kernels of this backend need one")]
        if not told.get("ControlAvailable"):
            text = f"this engine is no manager ({told.get('LocalNodeState') or 'inactive'})"
            return [Finding(ok=False, subject=subject, text=text, advice=NOT_A_MANAGER.advice)]
        return [Finding(ok=True, subject=subject, text=f"{told.get('Nodes')} nodes, {told.get('Managers')} managers")]


def _remove(client: APIClient, handle: Handle) -> None:
    from docker.errors import NotFound

    for what, remove in (
        ("service", client.remove_service),
        ("secret", client.remove_secret),
        ("config", client.remove_config),
    ):
        if what in handle:
            with contextlib.suppress(NotFound):
                remove(handle[what])


def _network(client: APIClient, name: str, kernel_id: str) -> str:
    """Return the id of a network; a part of an id would find one as well, and that of the node is not for services."""
    told = client.inspect_network(name)
    if told["Scope"] != "swarm" or told["Driver"] in ("host", "bridge", "null"):
        raise LaunchDenied(f"kernel {kernel_id}: network {name} is its node's own, and not for services")
    return str(told["Id"])


def _handle(where: Engine, service: str, spec: Mapping[str, Any]) -> Handle:
    inside = spec["TaskTemplate"]["ContainerSpec"]
    handle = {"kernel_id": spec["Labels"]["kernel_id"], "engine": where.where.name, "service": service}
    for what, key in (("secret", "SecretID"), ("config", "ConfigID")):
        held = inside.get(f"{what.capitalize()}s") or ()
        ours = [one[key] for one in held if one[f"{what.capitalize()}Name"].startswith("gp-")]
        handle.update({what: ours[0]} if ours else {})
    return handle


def _without_service(
    where: Engine, client: APIClient, ours: Callable[[Mapping[str, Any]], bool], found: list[Handle]
) -> list[Handle]:
    """Return what starts that broke off have left: a config and a secret, and no service."""
    used = {handle.get(what) for handle in found for what in ("config", "secret")}
    lost: dict[str, Handle] = {}
    for what, some in (("config", client.configs), ("secret", client.secrets)):
        for one in some(filters={"label": "gp.installation"}):
            if ours(one["Spec"]) and one["ID"] not in used:
                handle: Handle = {"kernel_id": one["Spec"]["Labels"]["kernel_id"], "engine": where.where.name}
                lost.setdefault(one["Spec"]["Name"], handle)[what] = one["ID"]
    return list(lost.values())


def _address(task: Mapping[str, Any]) -> str | None:
    attached = task.get("NetworksAttachments") or ()
    return next((one["Addresses"][0].partition("/")[0] for one in attached if one.get("Addresses")), None)


def _generic(gpus: str) -> dict[str, Any]:
    if not gpus.isdecimal():
        raise ConfigError("gpus: a Swarm counts them: a number")
    return {"DiscreteResourceSpec": {"Kind": "NVIDIA-GPU", "Value": int(gpus)}}


@hookimpl
def gp_backends() -> Iterable[type[Backend]]:
    """Offer kernels in a Swarm."""
    return [SwarmBackend]
