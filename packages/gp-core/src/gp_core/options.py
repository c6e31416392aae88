"""The options of a kernel, in three classes, and how kernel.json may touch each.

- *process* (listener, key, store): `KernelServer`; never from kernel.json;
- *policy* (users, ids, limits, ports): kernel.json may only narrow what the operator says;
- *launch* (timeouts, hosts, image, resources): kernel.json wins over configuration, command line and environment.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from traitlets import (
    Bool,
    CaselessStrEnum,
    Container,
    Float,
    HasTraits,
    Instance,
    Int,
    List,
    TraitError,
    TraitType,
    Unicode,
    default,
)
from traitlets.config import LoggingConfigurable

from .backend import Backend
from .errors import ConfigError
from .policies import Policy, narrowed
from .server import KernelServer
from .settings import from_env

WITHOUT_EFFECT = {
    "poll_interval": "kernels report by themselves",
    "max_poll_attempts": "kernels report by themselves",
    "socket_timeout": "connections have deadlines of their own",
    "tunneling_enabled": "launchers dial out",
    "enable_tunneling": "launchers dial out",
    "tunnel_max_keep_alive": "launchers dial out",
    "max_port_range_retries": "the launcher tries every port of the range",
}
"""Names of the peer that are accepted and do nothing, and why."""


class ProvisionerOptions(LoggingConfigurable):
    """The options that every backend's kernels have."""

    # policy: kernel.json narrows these
    authorized_users = from_env(List(Unicode(), help="Who may start kernels; empty: everybody."), "GP_AUTHORIZED_USERS")
    unauthorized_users = from_env(
        List(Unicode(), help="Who may not, even if authorized. Default: root, unless user_source is os."),
        "GP_UNAUTHORIZED_USERS",
    )
    prohibited_uids = from_env(List(Unicode(), ["0"], help="User ids that no kernel may run as."), "GP_PROHIBITED_UIDS")
    prohibited_gids = from_env(
        List(Unicode(), ["0"], help="Group ids that no kernel may run as."), "GP_PROHIBITED_GIDS"
    )
    port_range = from_env(Unicode("0..0", help="Ports of kernels, low..high; 0..0: any."), "GP_PORT_RANGE")
    min_port_range_size = from_env(Int(1000, min=0, help="Smallest port_range."), "GP_MIN_PORT_RANGE_SIZE")
    max_kernels_per_user = from_env(
        Int(None, allow_none=True, min=1, help="Kernels that a user may have at a time."), "GP_MAX_KERNELS_PER_USER"
    )
    launch_timeout_cap = from_env(
        Float(600.0, min=1, help="Seconds that a client may choose as launch timeout at most."), "GP_LAUNCH_TIMEOUT_CAP"
    )
    impersonation_enabled = from_env(
        Bool(False, help="Start kernels as their user; a backend that cannot starts none."), "GP_IMPERSONATION_ENABLED"
    )
    client_parameters = Instance(
        dict, (), help="Parameters open to clients for every kernelspec, as properties of a JSON schema."
    ).tag(config=True)
    env_passthrough = from_env(
        List(Unicode(), help="Variables of the server's environment that every kernel gets."), "GP_ENV_PASSTHROUGH"
    )

    # launch: kernel.json wins
    launch_timeout = from_env(
        Float(30.0, min=0.1, help="Seconds until a silent start is given up."), "GP_LAUNCH_TIMEOUT"
    )
    shutdown_timeout = from_env(
        Float(None, allow_none=True, min=0, help="Seconds for a kernel to end; default: the application's."),
        "GP_SHUTDOWN_TIMEOUT",
    )
    orphan_timeout = from_env(
        Float(
            None, allow_none=True, min=1, help="Seconds without a server until a kernel ends; default: 24 h or 10 min."
        ),
        "GP_ORPHAN_TIMEOUT",
    )
    channels = from_env(
        CaselessStrEnum(
            ["relay", "direct"],
            "relay",
            help="How clients reach a kernel: through its launcher's connection, or by its own ports.",
        ),
        "GP_CHANNELS",
    )
    kernel_transport = CaselessStrEnum(
        ["auto", "ipc", "tcp"],
        "auto",
        help="What a relayed kernel binds over there: tcp, or ipc in a private folder; auto: ipc for ipykernel.",
    ).tag(config=True)
    blackout_buffer = from_env(
        Int(64 * 1024 * 1024, min=0, help="Bytes of output that the far side keeps while nobody takes it (relay)."),
        "GP_BLACKOUT_BUFFER",
    )
    startup_confirmation = CaselessStrEnum(
        ["listening", "hello"], "listening", help="What confirms a start: the kernel's sockets, or the launcher's call."
    ).tag(config=True)
    submit = CaselessStrEnum(
        ["api", "script"],
        allow_none=True,
        default_value=None,
        help="Who creates the job: the backend, or argv run here.",
    ).tag(config=True)
    launcher_protocol = Int(2, min=1, max=2, help="1: argv brings a launcher of gateway_provisioners.").tag(config=True)

    @default("unauthorized_users")
    def _unauthorized_users(self) -> list[str]:
        import os

        from .server import kernel_server

        if (named := os.environ.get("GP_UNAUTHORIZED_USERS")) is not None:
            return [name.strip() for name in named.split(",") if name.strip()]
        # with "os" the server's own user is the only one: to deny root then would only break servers in containers
        return [] if kernel_server(self.config).user_source == "os" else ["root"]

    def operator_policy(self) -> Policy:
        """Return the policy before any kernelspec."""
        from .parameters import from_schema

        named = {name: getattr(self, name) for name in POLICY if name not in ("env_passthrough", "client_parameters")}
        opened = from_schema({"type": "object", "properties": self.client_parameters}) if self.client_parameters else {}
        return Policy.parse({**named, "client_parameters": opened})


POLICY = (
    "authorized_users",
    "unauthorized_users",
    "prohibited_uids",
    "prohibited_gids",
    "port_range",
    "min_port_range_size",
    "max_kernels_per_user",
    "launch_timeout_cap",
    "impersonation_enabled",
    "client_parameters",
    "env_passthrough",
)


@functools.cache
def configurable(cls: type[HasTraits]) -> Mapping[str, TraitType[Any, Any]]:
    """Return the options of a class by name, but those that are tagged as the operator's own (``operator=True``).

    Looked up once, because traitlets goes through all members each time.
    """
    return MappingProxyType(cls.class_traits(config=True, operator=lambda tagged: not tagged))


def launch_options(backend: type[Backend]) -> dict[str, TraitType[Any, Any]]:
    """Return every option that a kernel.json of this backend may set freely, by name."""
    common = {name: trait for name, trait in configurable(ProvisionerOptions).items() if name not in POLICY}
    return {**common, **configurable(backend)}


@dataclass(frozen=True)
class Chosen:
    """What a kernelspec's ``config`` comes to: values for provisioner and backend, and the narrowed policy."""

    provisioner: dict[str, Any]
    backend: dict[str, Any]
    policy: Policy
    ignored: dict[str, str]


def choose(config: Mapping[str, Any], backend: type[Backend], operator: Policy) -> Chosen:
    """Sort and check the ``config`` of a kernelspec.

    Args:
        config: The stanza's ``config``.
        backend: Of the provisioner that the stanza names.
        operator: The policy to narrow.

    Raises:
        ConfigError: An unknown or forbidden key, or a wrong value; the text names the key and what to do.
    """
    known = launch_options(backend)
    common = configurable(ProvisionerOptions)
    chosen = Chosen({}, {}, narrowed(operator, config), {})
    for key, value in config.items():
        if key in configurable(KernelServer):
            raise ConfigError(f"{key} belongs to the whole server: set it in its configuration, not in kernel.json")
        if key == "env_passthrough" or key in backend.class_traits(config=True, operator=True):
            raise ConfigError(f"{key} is the operator's: set it in the application's configuration, not in kernel.json")
        if key in POLICY:
            pass
        elif key in WITHOUT_EFFECT:
            chosen.ignored[key] = WITHOUT_EFFECT[key]
        elif key in known:
            target = chosen.backend if key not in common else chosen.provisioner
            target[key] = checked(key, value, known[key])
        else:
            near = difflib.get_close_matches(key, [*known, *POLICY], 1)
            hint = f"; did you mean {near[0]}?" if near else f"; it may have: {', '.join(sorted(known))}"
            raise ConfigError(f"config of the kernelspec: {backend.name} has no option {key!r}{hint}")
    return chosen


def checked(key: str, value: Any, trait: TraitType[Any, Any]) -> Any:
    """Return the value of an option in its own type; text is read as on a command line.

    Raises:
        ConfigError: It is no such value; the text names option and value.
    """
    try:
        if isinstance(value, str) and isinstance(trait, Container):
            value = trait.from_string_list([item.strip() for item in value.split(",") if item.strip()])
        elif isinstance(value, str) and not isinstance(trait, Unicode):
            value = trait.from_string(value)
        elif type(value) in (int, float) and isinstance(trait, Unicode):
            value = str(value)  # a typed parameter, such as two processors
        return trait._validate(HasTraits(), value)
    except (TraitError, ValueError) as error:
        raise ConfigError(f"{key}: {value!r} is not accepted: {error}") from None
