"""The one provisioner: what jupyter_client asks for on one side, a backend on the other.

Every method hands its work to the runtime's loop and awaits it from whatever loop it is called on. jupyter_client calls
them in these orders (8.x):

- start: ``pre_launch``, ``launch_kernel``, ``post_launch``
- restart: ``send_signal(SIGINT)``, ``shutdown_requested(restart=True)``, ``poll``, ``wait``,
  ``cleanup(restart=True)``, start
- restart now, autorestart: ``kill(restart=False)``, ``wait``, ``cleanup(restart=True)``, start
- shutdown: as restart, or ``kill``; then ``cleanup(restart=False)``

So ``kill`` and ``terminate`` end the kernel's process only; ``cleanup`` alone decides about launcher and job.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import pwd
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, ParamSpec, TypeVar, cast

import zmq
from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.multikernelmanager import MultiKernelManager
from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase, KernelProvisionerMeta

from gp_launchers import __version__ as launcher_version
from gp_launchers import bundle

from .backend import Backend, LaunchRequest
from .command import fill, launch_environment, names_our_launcher, placeholders
from .errors import ConfigError, GPError, readable
from .kernel import Plan, RemoteKernel
from .options import ProvisionerOptions, choose
from .parameters import from_client, from_schema
from .plugins import plugins
from .policies import Policy, check_limit, check_user, opened, resolve_user
from .ports import PortRange
from .protocol import PORTS
from .protocol1 import Terms
from .runtime import runtime
from .server import KernelServer, data_folder, kernel_server
from .store import Record

T = TypeVar("T")
P = ParamSpec("P")


def boundary(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Make the errors of a method readable in every Jupyter server, and keep the manager's state honest."""

    @functools.wraps(method)
    async def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(*args, **kwargs)
        except GPError as error:
            shown = readable(error)
            parent: Any = getattr(args[0], "parent", None)
            if hasattr(parent, "execution_state"):  # use_pending_kernels has answered 201 already
                parent.execution_state, parent.reason = "dead", str(shown)
            raise shown from error.__cause__

    return guarded


class RemoteProvisioner(KernelProvisionerBase, ProvisionerOptions, metaclass=KernelProvisionerMeta):  # type: ignore[metaclass]
    """Starts kernels through the backend that ``backend_name`` names; subclasses have nothing else."""

    backend_name: ClassVar[str]

    def __init__(self, **kwargs: Any) -> None:
        own = {name: kwargs.pop(name) for name in ("kernel_id", "kernel_spec", "parent", "config") if name in kwargs}
        super().__init__(**own)
        self.connection_info = {}  # upstream's default is one dict shared by the whole class
        self._options = kwargs  # config of kernel.json: checked in pre_launch, where an error reaches the user
        self._kernel: RemoteKernel | None = None
        self._reaped = True
        self._plan: Plan | None = None

    # -- what jupyter_client asks for

    @property
    def has_process(self) -> bool:
        return self._kernel is not None and not self._reaped

    async def poll(self) -> int | None:
        """Return None while the kernel lives, else its exit code; called all the time, so from cached state."""
        return self._kernel.exit_code if self._kernel is not None else 0

    async def wait(self) -> int | None:
        code = await runtime().call(self._kernel.wait()) if self._kernel is not None else 0
        self._reaped = True
        return code

    @boundary
    async def send_signal(self, signum: int) -> None:
        if self._kernel is not None:
            await runtime().call(self._kernel.signal(signum))

    @boundary
    async def kill(self, restart: bool = False) -> None:
        await self.send_signal(signal.SIGKILL)

    @boundary
    async def terminate(self, restart: bool = False) -> None:
        await self.send_signal(signal.SIGTERM)

    @boundary
    async def cleanup(self, restart: bool = False) -> None:
        if self._kernel is not None and not restart:
            kernel, self._kernel, self._reaped = self._kernel, None, True
            await runtime().call(kernel.remove())

    async def shutdown_requested(self, restart: bool = False) -> None:
        if self._kernel is not None:
            runtime().loop.call_soon_threadsafe(self._kernel.end_requested)

    def get_shutdown_wait_time(self, recommended: float = 5.0) -> float:
        chosen = self.shutdown_timeout if self.shutdown_timeout is not None else recommended
        return plugins().timeout(self._kernel.info, "shutdown", chosen) if self._kernel is not None else chosen

    def get_stable_start_time(self, recommended: float = 10.0) -> float:
        return recommended  # launch_kernel returns when the kernel listens: no allowance for a slow platform is needed

    @boundary
    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        # not the base's: it fills the kernelspec's ${X} with this server's environment, which must not travel
        requested = kwargs.pop("env", None)
        extra = kwargs.pop("extra_arguments", None) or []
        kwargs.pop("transport_encryption", None)
        self._plan = await self._planned(requested, extra, kwargs)
        self.connection_info = _for_manager(self._plan.connection)
        return {**kwargs, "cmd": list(self._plan.request.argv), "env": dict(requested or os.environ)}

    @boundary
    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        assert self._plan is not None
        plan = self._plan
        kernel = self._kernel or await self._new_kernel(plan.request)
        try:
            await runtime().call(kernel.restart(plan) if self._kernel else kernel.launch(plan))
        except asyncio.CancelledError:
            runtime().submit(kernel.abandon())
            raise
        self._kernel = kernel
        self._reaped = False
        self.connection_info = _for_manager(self._kernel.connection)
        return self.connection_info

    async def get_provisioner_info(self) -> dict[str, Any]:
        """Return what another process needs; JSON-able, its secrets sealed with the server's key."""
        info = dict(self.connection_info)
        hidden = {name: _text(info.pop(name)) for name in SECRET if name in info}
        server = kernel_server(self.config)
        sealed = server.identity.seal(json.dumps(hidden).encode()) if server.identity else None
        return {"kernel_id": self.kernel_id, "connection_info": info, "sealed": sealed, "backend": self.backend_name}

    async def load_provisioner_info(self, provisioner_info: dict[str, Any]) -> None:
        """Inverse of `get_provisioner_info`.

        Raises:
            StoreError: It was sealed with another server's key.
        """
        self.kernel_id = provisioner_info["kernel_id"]
        info = dict(provisioner_info["connection_info"])
        server = kernel_server(self.config)
        await runtime().call(server.open())
        if sealed := provisioner_info.get("sealed"):
            assert server.identity is not None
            info |= json.loads(server.identity.unseal(sealed))
        self.connection_info = _for_manager(info)

    def resolve_path(self, path_str: str) -> str | None:
        """Resolve a path of the kernel's, if it runs on this machine."""
        if self._plan is None or not self._backend_class.runs_here:
            return None
        path = Path(self._plan.request.cwd or Path.cwd(), Path(path_str).expanduser())
        return path.as_posix() if path.exists() else None

    # -- from kernelspec, configuration and start request to a plan

    @property
    def _backend_class(self) -> type[Backend]:
        return plugins().backend(self.backend_name)

    async def _planned(self, requested: Mapping[str, str] | None, extra: list[str], kwargs: Mapping[str, Any]) -> Plan:
        server = kernel_server(self.config)
        backend = self._backend_class
        chosen = choose(self._options, backend, self.operator_policy())
        for name, why in chosen.ignored.items():
            self.log.info("kernel %s: option %s has no effect: %s", self.kernel_id, name, why)
        for name, value in chosen.provisioner.items():
            setattr(self, name, value)
        client = dict(requested if requested is not None else os.environ)
        user = resolve_user(server.user_source, client, os.environ, _own_name())
        check_user(chosen.policy, user)
        parameters = self._client_values(chosen.policy, client)
        timeout = parameters.pop("launch_timeout", self.launch_timeout)
        self._backend_options = {**chosen.backend, **_fitting(parameters, backend)}
        await runtime().call(server.open_protocol_1() if self.launcher_protocol == 1 else server.open())
        env = launch_environment(
            kernelspec=self.kernel_spec.env, requested=requested, process=os.environ, passed=self.env_passthrough
        )
        env |= {"KERNEL_ID": self.kernel_id, "KERNEL_USERNAME": user}
        argv, wrapped = self._command(server, backend, extra, {**kwargs, **env}, chosen.policy.port_range)
        request = LaunchRequest(
            kernel_id=self.kernel_id,
            kernel_name=getattr(self.parent, "kernel_name", "") or self.kernel_spec.display_name,
            user=user,
            backend=self.backend_name,
            argv=argv,
            wrapped=wrapped,
            env=env,
            cwd=_text(kwargs["cwd"]) if kwargs.get("cwd") else env.get("KERNEL_WORKING_DIR"),
            submit=self.submit or ("api" if wrapped else "script"),
            parameters=parameters,
            port_range=chosen.policy.port_range,
            launcher_file=data_folder() / f"gp-launcher-{launcher_version}.pyz",
            launcher_options=self._launcher_options(server, backend, chosen.policy.port_range),
        )
        confirm: Literal["connected", "listening"] = (
            "connected" if self.startup_confirmation == "hello" else "listening"
        )
        self._policy = chosen.policy
        older = Terms(request.port_range, self._encryption() == "required") if self.launcher_protocol == 1 else None
        connection = self._connection(backend)
        return Plan(request=request, connection=connection, timeout=timeout, confirm=confirm, older=older)

    def _client_values(self, policy: Policy, client: Mapping[str, str]) -> dict[str, Any]:
        schema = self.kernel_spec.metadata.get("parameters")
        open_to_clients = opened(policy, from_schema(schema) if schema else {})
        defaults = {name: known.default for name, known in open_to_clients.items() if known.default is not None}
        return defaults | from_client(open_to_clients, client, launch_timeout_cap=policy.launch_timeout_cap)

    def _command(
        self,
        server: KernelServer,
        backend: type[Backend],
        extra: list[str],
        values: Mapping[str, Any],
        ports: PortRange,
    ) -> tuple[list[str], bool]:
        argv = [*self.kernel_spec.argv, *extra]
        wrapped = "response_address" not in placeholders(argv)
        if not wrapped and self.launcher_protocol != 1 and not names_our_launcher(argv):
            raise ConfigError(
                f"kernelspec {self.kernel_spec.display_name!r} starts a launcher of an older kind: make a new one with "
                'jupyter gp install --from, or put "launcher_protocol": 1 into its config if the operator allows it'
            )
        if self.launcher_protocol == 1 and (wrapped or names_our_launcher(argv)):
            raise ConfigError(
                f'kernelspec {self.kernel_spec.display_name!r} says "launcher_protocol": 1, and its argv starts no '
                "launcher of that kind: remove the option"
            )
        values = {
            **values,
            "kernel_id": self.kernel_id,
            "port_range": ports,
            "response_address": ",".join(server.addresses(local=backend.runs_here)),
            "public_key": server.pins,
            "transport_encryption": self._encryption(),
        }
        if server.protocol1 is not None and self.launcher_protocol == 1:
            values["public_key"] = server.protocol1.public_key
            values["response_address"] = server.ipv4_address(local=backend.runs_here)
        if backend.runs_here or not wrapped or self.submit == "script":  # argv runs on this machine
            values |= {"resource_dir": self.kernel_spec.resource_dir, "prefix": sys.prefix}
            if argv[0] in ("python", "python3", f"python{sys.version_info[0]}.{sys.version_info[1]}"):
                argv[0] = sys.executable
        values.pop("connection_file", None)
        return fill(argv, values), wrapped

    def _launcher_options(self, server: KernelServer, backend: type[Backend], ports: PortRange) -> list[str]:
        return [
            f"--kernel-id={self.kernel_id}",
            f"--response-address={','.join(server.addresses(local=backend.runs_here))}",
            f"--public-key={server.pins}",
            f"--port-range={ports}",
            f"--orphan-timeout={self._orphan_timeout():g}",
        ]

    def _encryption(self) -> str:
        policy = getattr(self.parent, "transport_encryption", "disabled") if self.parent else "disabled"
        return "" if policy == "disabled" else str(policy)

    def _connection(self, backend: type[Backend]) -> dict[str, Any]:
        """Return the template of the kernel's connection file; keys and ports stay those of the first start."""
        km = self.parent
        old = self.connection_info
        info: dict[str, Any] = {
            "transport": km.transport if km is not None and backend.runs_here else "tcp",
            "ip": km.ip if km is not None and backend.runs_here else backend.bind_address,
            "key": _text(old.get("key") or (km.session.key if km is not None else os.urandom(32).hex())),
            "signature_scheme": km.session.signature_scheme if km is not None else "hmac-sha256",
            "kernel_name": getattr(km, "kernel_name", ""),
        }
        for name in PORTS:
            info[name] = old.get(name) or (getattr(km, name, 0) if backend.runs_here else 0)
        return info | self._curve_keys(old)

    def _curve_keys(self, old: Mapping[str, Any]) -> dict[str, str]:
        if "curve_publickey" in old:
            return {name: _text(old[name]) for name in ("curve_publickey", "curve_secretkey")}
        wanted = self._encryption()
        supported = getattr(self.parent, "_kernel_supports_curve_encryption", lambda: False)()
        if not wanted or (wanted == "auto" and not supported):
            return {}
        public, secret = zmq.curve_keypair()
        return {"curve_publickey": public.decode(), "curve_secretkey": secret.decode()}

    async def _new_kernel(self, request: LaunchRequest) -> RemoteKernel:
        server = kernel_server(self.config)

        async def made() -> RemoteKernel:
            if not request.launcher_file.exists():
                await runtime().blocking(bundle.build, request.launcher_file)
            if self._policy.max_kernels_per_user is not None:
                mine = [record for record in await runtime().blocking(server.store.list) if record.user == request.user]
                check_limit(self._policy, request.user, len(mine))
            backend = self._backend_class(parent=self.parent, config=self.config, **self._backend_options)
            record = Record(
                kernel_id=request.kernel_id,
                kernel_name=request.kernel_name,
                user=request.user,
                backend=self.backend_name,
                options=self._backend_options,
                bind=",".join(server.addresses(local=backend.runs_here)),
                orphan_timeout=self._orphan_timeout(),
            )
            return RemoteKernel(server, backend, record)

        return await runtime().call(made())

    def _orphan_timeout(self) -> float:
        if self.orphan_timeout is not None:
            return self.orphan_timeout
        # a server of many kernels comes back, and a laptop sleeps over night; a script's kernel serves nobody else
        of_many = isinstance(getattr(self.parent, "parent", None), MultiKernelManager)
        return 24 * 3600.0 if of_many else 600.0


SECRET = ("key", "curve_publickey", "curve_secretkey")


def _own_name() -> str:
    """Return the name of the server's own user; not from the environment, as `getpass.getuser` does."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid-{os.getuid()}"  # containers run as users without a name


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _for_manager(info: Mapping[str, Any]) -> KernelConnectionInfo:
    """Return a connection info in jupyter_client's types: the key as bytes."""
    made = dict(info)
    if isinstance(made.get("key"), str):
        made["key"] = made["key"].encode()
    return cast(KernelConnectionInfo, made)


def _fitting(parameters: Mapping[str, Any], backend: type[Backend]) -> dict[str, Any]:
    """Return the parameters that are options of the backend; the others are its ``request.parameters`` only."""
    return {name: value for name, value in parameters.items() if name in backend.class_traits(config=True)}
