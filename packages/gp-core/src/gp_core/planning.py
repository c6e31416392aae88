"""From kernelspec, configuration and start request to a plan: policy, options, command, environment, connection."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import zmq
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.multikernelmanager import MultiKernelManager
from jupyter_core.paths import jupyter_runtime_dir

from .backend import Backend, LaunchRequest
from .command import fill, launch_environment, names_our_launcher, placeholders
from .errors import ConfigError, LaunchDenied
from .options import ProvisionerOptions, checked, choose, configurable
from .parameters import from_client, from_schema
from .policies import Policy, check_user, opened, resolve_user
from .ports import PortRange
from .protocol import PORTS
from .protocol1 import Terms
from .server import KernelServer
from .starting import Plan

CURVE = ("curve_publickey", "curve_secretkey")


@dataclass(frozen=True)
class Planned:
    """A plan, and what else a new kernel is made from.

    Args:
        plan: For `RemoteKernel`.
        policy: The operator's, narrowed by the kernelspec.
        backend_options: Values for the backend's traits.
        orphan_timeout: Seconds without a server until the kernel ends.
    """

    plan: Plan
    policy: Policy
    backend_options: dict[str, Any]
    orphan_timeout: float


class Planner:
    """Plans the starts of one kernel.

    Args:
        server: Of this process; its listener is open.
        kernel_id: The kernel's.
        spec: Its kernelspec.
        manager: jupyter_client's KernelManager, or None.
        options: Of the provisioner; those of the kernelspec are set on it.
        config: ``config`` of the kernelspec's stanza.
        backend: The provisioner's.
    """

    def __init__(
        self,
        server: KernelServer,
        kernel_id: str,
        spec: KernelSpec,
        manager: Any,
        options: ProvisionerOptions,
        config: Mapping[str, Any],
        backend: type[Backend],
    ) -> None:
        self.server, self.kernel_id, self.spec, self.manager = server, kernel_id, spec, manager
        self.options, self.backend = options, backend
        self._chosen = choose(config, backend, options.operator_policy())
        for name, why in self._chosen.ignored.items():
            options.log.info("kernel %s: option %s has no effect: %s", kernel_id, name, why)
        for name, value in self._chosen.provisioner.items():
            setattr(options, name, value)

    def plan(
        self,
        requested: Mapping[str, str] | None,
        extra: Sequence[str],
        kwargs: Mapping[str, Any],
        old: Mapping[str, Any],
    ) -> Planned:
        """Plan one start.

        Args:
            requested: ``env`` of the start request.
            extra: Arguments to append to the command.
            kwargs: The other arguments of the start request.
            old: Connection info of the former start: ports and keys stay.

        Raises:
            ConfigError: Kernelspec, options or parameters cannot work.
            LaunchDenied: Policy forbids the user.
        """
        policy = self._chosen.policy
        process = dict(os.environ)  # once: every look into os.environ encodes and decodes
        client = requested if requested is not None else process
        user = resolve_user(self.server.user_source, client, process, self.server.own_user)
        check_user(policy, user)
        if policy.impersonation_enabled and not self.backend.impersonates:
            raise LaunchDenied(
                f"kernels must run as their user here (impersonation_enabled), and the {self.backend.name} backend "
                f"cannot start one as {user!r}: choose another kernelspec"
            )
        parameters = self._parameters(policy, client)
        timeout = parameters.pop("launch_timeout", self.options.launch_timeout)
        passed = self.options.env_passthrough
        env = launch_environment(kernelspec=self.spec.env, requested=requested, process=process, passed=passed)
        env |= {"KERNEL_ID": self.kernel_id, "KERNEL_USERNAME": user}
        words = {name: value for name, value in kwargs.items() if isinstance(value, (str, int))}
        argv, wrapped = self._command(extra, {**words, **parameters}, policy.port_range)
        request = LaunchRequest(
            kernel_id=self.kernel_id,
            kernel_name=getattr(self.manager, "kernel_name", "") or self.spec.display_name,
            user=user,
            backend=self.backend.name,
            argv=argv,
            wrapped=wrapped,
            env=env,
            cwd=text(kwargs["cwd"]) if kwargs.get("cwd") else env.get("KERNEL_WORKING_DIR"),
            submit=self.backend.submission(self.spec.argv, self.options.submit),
            impersonate=policy.impersonation_enabled,
            prohibited_uids=policy.prohibited_uids,
            prohibited_gids=policy.prohibited_gids,
            parameters=parameters,
            port_range=policy.port_range,
            launcher_file=self.server.launcher_file,
            listener=self.server.listener,
            launcher_options=launcher_options(
                self.server, self.kernel_id, policy.port_range, self.orphan_timeout, local=self.backend.runs_here
            ),
        )
        known = configurable(self.backend)
        fitting = {name: checked(name, value, known[name]) for name, value in parameters.items() if name in known}
        connection = self._connection(old)
        plan = Plan(
            request=request,
            connection=connection,
            far=self._far(connection, argv) if self._is_relayed else None,
            blackout_buffer=self.options.blackout_buffer,
            timeout=timeout,
            confirm=self._confirmation,
            older=Terms(policy.port_range, self.encryption_required) if self._is_older else None,
        )
        return Planned(plan, policy, {**self._chosen.backend, **fitting}, self.orphan_timeout)

    @property
    def _confirmation(self) -> Literal["connected", "listening"]:
        return "connected" if self.options.startup_confirmation == "hello" else "listening"

    @property
    def _is_older(self) -> bool:
        return bool(self.options.launcher_protocol == 1)

    @property
    def _is_relayed(self) -> bool:
        return bool(self.options.channels == "relay") and not self._is_older  # those launchers carry nothing

    @property
    def orphan_timeout(self) -> float:
        """Seconds without a server until the kernel ends."""
        if self.options.orphan_timeout is not None:
            return float(self.options.orphan_timeout)
        # a server of many kernels comes back, and a laptop sleeps over night; a script's kernel serves nobody else
        return 24 * 3600.0 if isinstance(getattr(self.manager, "parent", None), MultiKernelManager) else 600.0

    def _parameters(self, policy: Policy, client: Mapping[str, str]) -> dict[str, Any]:
        schema = self.spec.metadata.get("parameters")
        open_to_clients = opened(policy, from_schema(schema) if schema else {})
        defaults = {name: known.default for name, known in open_to_clients.items() if known.default is not None}
        return defaults | from_client(open_to_clients, client, launch_timeout_cap=policy.launch_timeout_cap)

    # -- command

    def _command(self, extra: Sequence[str], words: Mapping[str, Any], ports: PortRange) -> tuple[list[str], bool]:
        argv = [*self.spec.argv, *extra]
        wrapped = "response_address" not in placeholders(argv)
        self._check_launcher(argv, wrapped)
        here = self.backend.runs_here
        values = {
            **words,
            "kernel_id": self.kernel_id,
            "port_range": ports,
            "response_address": ",".join(self.server.addresses(local=here)),
            "public_key": self.server.pins,
            "transport_encryption": self._encryption,
        }
        if self.server.protocol1 is not None and self._is_older:
            values["public_key"] = self.server.protocol1.public_key
            values["response_address"] = self.server.ipv4_address(local=here)
        if self.backend.runs_command_here(argv, self.options.submit):
            values |= {"resource_dir": self.spec.resource_dir, "prefix": sys.prefix}
            if argv[0] in ("python", "python3", f"python{sys.version_info[0]}.{sys.version_info[1]}"):
                argv[0] = sys.executable
        values.pop("connection_file", None)  # the launcher's
        return fill(argv, values), wrapped

    def _check_launcher(self, argv: Sequence[str], wrapped: bool) -> None:
        name = self.spec.display_name
        if not wrapped and not self._is_older and not names_our_launcher(argv):
            raise ConfigError(
                f"kernelspec {name!r} starts a launcher of an older kind: make a new one with "
                'jupyter gp install --from, or put "launcher_protocol": 1 into its config if the operator allows it'
            )
        if self._is_older and (wrapped or names_our_launcher(argv)):
            raise ConfigError(
                f'kernelspec {name!r} says "launcher_protocol": 1, and its argv starts no '
                "launcher of that kind: remove the option"
            )

    # -- connection

    @property
    def encryption_required(self) -> bool:
        """Whether channels must be encrypted."""
        return self._encryption == "required"

    @property
    def _encryption(self) -> str:
        policy = getattr(self.manager, "transport_encryption", "disabled")
        return "" if policy == "disabled" else str(policy)

    def _connection(self, old: Mapping[str, Any]) -> dict[str, Any]:
        """Return the template of the connection file of clients: what is 0 in it is chosen at the start."""
        manager, here = self.manager, (self._is_relayed or self.backend.runs_here) and self.manager is not None
        ip = manager.ip if here else self.backend.bind_address
        if self._is_relayed and (not here or manager.transport == "tcp"):
            ip = "127.0.0.1"
        if here and manager.transport == "ipc":
            # upstream's own default lies in the server's current folder, whoever may write there
            private = os.path.join(jupyter_runtime_dir(), f"kernel-{self.kernel_id}-ipc")
            ip = private if ip == "kernel-ipc" else ip
        info: dict[str, Any] = {
            "transport": manager.transport if here else "tcp",
            "ip": ip,
            "key": text(old.get("key") or (manager.session.key if manager is not None else os.urandom(32).hex())),
            "signature_scheme": manager.session.signature_scheme if manager is not None else "hmac-sha256",
            "kernel_name": getattr(manager, "kernel_name", ""),
        }
        for name in PORTS:
            info[name] = old.get(name) or (getattr(manager, name, 0) if here else 0)
        return info | self._curve_keys(old)

    def _far(self, connection: Mapping[str, Any], argv: Sequence[str]) -> dict[str, Any]:
        """Return the template of the connection file over there, if only its launcher connects to the kernel."""
        can = self.options.kernel_transport
        if can == "auto":
            is_ipykernel = ("-m", "ipykernel_launcher") in itertools.pairwise(argv)
            can = "ipc" if is_ipykernel and CURVE[0] not in connection else "tcp"
        place = {"transport": "ipc", "ip": ""} if can == "ipc" else {"transport": "tcp", "ip": "127.0.0.1"}
        return {**connection, **place, **dict.fromkeys(PORTS, 0)}

    def _curve_keys(self, old: Mapping[str, Any]) -> dict[str, str]:
        kept = old if CURVE[0] in old else {name: getattr(self.manager, name, None) for name in CURVE}
        if all(kept[name] for name in CURVE):
            return {name: text(kept[name]) for name in CURVE}
        supported = getattr(self.manager, "_kernel_supports_curve_encryption", lambda: False)()
        if not self._encryption or (self._encryption == "auto" and not supported):
            return {}
        return {name: key.decode() for name, key in zip(CURVE, zmq.curve_keypair(), strict=True)}


def launcher_options(
    server: KernelServer, kernel_id: str, ports: PortRange, orphan_timeout: float, *, local: bool
) -> list[str]:
    """Return the launcher's arguments; none is a secret.

    Args:
        server: To call back to.
        kernel_id: The kernel's.
        ports: Where it may listen.
        orphan_timeout: Seconds without a server until it ends.
        local: The launcher runs on this machine.
    """
    return [
        f"--kernel-id={kernel_id}",
        f"--response-address={','.join(server.addresses(local=local))}",
        f"--public-key={server.pins}",
        f"--port-range={ports}",
        f"--orphan-timeout={orphan_timeout:g}",
    ]


def text(value: Any) -> str:
    """Return text for text or its bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)
