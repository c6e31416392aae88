"""Built-in policy: who the user is, who may start what, and when a start has failed.

The operator's policy comes from the application's configuration. A kernelspec may lie in a folder that belongs
to the user, so its ``config`` can only narrow that policy.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ._markers import hookimpl
from .backend import KernelInfo, State, Status
from .errors import LAUNCHER_DIED, PLATFORM_FAILED, ConfigError, LaunchDenied
from .parameters import Parameter, control_character
from .ports import PortRange
from .startup import FAIL, WAIT, Verdict

IdKind = Literal["uid", "gid"]

LARGEST_ID = 2**32 - 2
"""Largest uid or gid; the next number is -1 to the kernel and means "leave as it is"."""


def resolve_user(source: str, client_env: Mapping[str, str], process_env: Mapping[str, str], os_user: str) -> str:
    """Return the one user name that every policy goes by.

    Args:
        source: ``os``: the server's own user; ``env:NAME``: a variable of the server, such as
            ``env:JUPYTERHUB_USER``; ``client``: ``KERNEL_USERNAME`` of the start request, for trusted callers.
        client_env: Variables that the client sent.
        process_env: The server's environment.
        os_user: Name of the server's own user.

    Raises:
        ConfigError: The source is none of these or yields no user name, or one that cannot be safe.
    """
    if source == "os":
        return _user_name(os_user)
    if source == "client":
        if not client_env.get("KERNEL_USERNAME"):
            raise ConfigError('user_source is "client", but the start request has no KERNEL_USERNAME')
        return _user_name(client_env["KERNEL_USERNAME"])
    if not source.startswith("env:") or not source[4:]:
        raise ConfigError(f"user_source {source!r} is none of os, env:NAME and client")
    if not process_env.get(source[4:]):
        raise ConfigError(f"user_source is {source!r}, but the server's environment has no {source[4:]}")
    return _user_name(process_env[source[4:]])


def _user_name(user: object) -> str:
    """Return a name that stays one word of a path and of a command line, and does not stand for uid 0."""
    if not isinstance(user, str):  # a client's JSON
        raise ConfigError(f"{user!r} is not acceptable as a user name")
    bad = (
        not 0 < len(user) <= 255
        or user != user.strip()
        or user in {".", ".."}
        or user[0] in "-+#"  # an option, and a uid in the languages of sudo and chown
        or not user.strip("0")
        or "/" in user
        or control_character(user)
    )
    if bad:
        shown = user if len(user) <= 80 else f"{user[:77]}..."
        raise ConfigError(f"{shown!r} is not acceptable as a user name")
    return user


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What may be started, by whom, where.

    Args:
        authorized_users: Who may start; empty means everybody.
        unauthorized_users: Who may not; wins over ``authorized_users``. By the default, that of the peer, a
            server in a root container that takes the user from ``os`` would start nothing.
        prohibited_uids: User ids that no kernel may run as.
        prohibited_gids: Group ids that no kernel may run as.
        port_range: Where kernels may listen.
        min_port_range_size: Fewest ports that a limited range may have.
        max_kernels_per_user: Kernels that one user may have at a time; None: no limit.
        launch_timeout_cap: Seconds that a client may make a start wait at most.
        impersonation_enabled: Kernels run as their user, or not at all.
        client_parameters: Parameters that the operator opens to clients for every kernelspec.
    """

    authorized_users: frozenset[str] = frozenset()
    unauthorized_users: frozenset[str] = frozenset({"root"})
    prohibited_uids: frozenset[int] = frozenset({0})
    prohibited_gids: frozenset[int] = frozenset({0})
    port_range: PortRange = field(default_factory=PortRange)
    min_port_range_size: int = 1000
    max_kernels_per_user: int | None = None
    launch_timeout_cap: float = 600.0
    impersonation_enabled: bool = False
    client_parameters: Mapping[str, Parameter] = field(default_factory=dict, hash=False)

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> Policy:
        """Read the operator's policy; a missing key or None leaves the default, other keys are not looked at.

        Args:
            config: Values by name of the field: users and ids as lists or as text separated by commas,
                ``port_range`` as ``low..high``.

        Raises:
            ConfigError: A value has a wrong type or cannot work; the text names the key.
        """
        policy = cls(**_read(config), client_parameters=config.get("client_parameters") or {})
        _check_ports(policy)
        return policy


def narrowed(policy: Policy, spec: Mapping[str, Any]) -> Policy:
    """Return the operator's policy, made stricter by what a kernelspec says.

    Args:
        policy: The operator's.
        spec: ``config`` of kernel.json; keys that are no policy are not looked at.

    Returns:
        Authorized users that both name, every denial of both, ports in both ranges, the lower limits.

    Raises:
        ConfigError: A value has a wrong type, only the operator may set it, or nothing would be left.
    """
    for key in sorted({"user_source", "client_parameters"} & spec.keys()):
        raise ConfigError(f"{key} is the operator's: set it in the application's configuration")
    said = _read(spec)
    combined = {key: _RULES[key][1](getattr(policy, key), value) for key, value in said.items()}
    if policy.authorized_users and said.get("authorized_users") and not combined["authorized_users"]:
        raise ConfigError("authorized_users of the kernelspec has nobody that the operator's allows")
    stricter = replace(policy, **combined)
    _check_ports(stricter)
    return stricter


def opened(policy: Policy, spec_parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Return all parameters open to clients; of two with the same variable, the operator's."""
    taken = {param.variable for param in policy.client_parameters.values()}
    others = {name: param for name, param in spec_parameters.items() if param.variable not in taken}
    return {**others, **policy.client_parameters}


def check_user(policy: Policy, user: str) -> None:
    """Check that a user may start a kernel.

    Raises:
        LaunchDenied: The user is denied or not among those that are authorized.
    """
    if user in policy.unauthorized_users:
        raise LaunchDenied(f"user {user!r} may not start kernels here (unauthorized_users)")
    if policy.authorized_users and user not in policy.authorized_users:
        raise LaunchDenied(f"user {user!r} may not start this kernel (authorized_users)")


def check_limit(policy: Policy, user: str, running: int) -> None:
    """Check that a user may have one more kernel.

    Args:
        policy: To check against.
        user: Who asks.
        running: Kernels that the user has now, without the new one.

    Raises:
        LaunchDenied: The user has as many as allowed.
    """
    limit = policy.max_kernels_per_user
    if limit is not None and running >= limit:
        text = f"user {user!r} has {running} kernels and may have {limit} (max_kernels_per_user)"
        raise LaunchDenied(f"{text}: shut one down first")


_DIGITS = re.compile(r"[+-]?(0x[0-9a-f]{1,80}|0o[0-7]{1,80}|0b[01]{1,80}|[0-9]{1,80})")


def normalise_id(value: object, kind: IdKind, *, lookup: Callable[[str], int] | None = None) -> int:
    """Return the number that a uid or gid stands for, however it is written.

    Args:
        value: A number, digits (``0``, ``00``, ``+0``, ``0x0``, ``0o0``; ``010`` is ten) or a name.
        kind: "uid" or "gid".
        lookup: Finds the number of a name or raises KeyError; default: the users or groups of this machine.
            ``root`` is 0 everywhere.

    Raises:
        ConfigError: It is no id, out of range, or an unknown name.
    """
    if isinstance(value, str):
        text = value.strip()
        digits = _DIGITS.fullmatch(text.lower())
        base = {"x": 16, "o": 8, "b": 2}.get(digits[1][1:2], 10) if digits else 0
        number = int(digits[0], base) if digits else _id_of_name(text, kind, lookup)
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    else:
        raise ConfigError(f"{kind} {value!r} is neither a number nor a name")
    if not 0 <= number <= LARGEST_ID:
        raise ConfigError(f"{kind} {value!r} is out of range: it must be 0 to {LARGEST_ID}")
    return number


def _id_of_name(name: str, kind: IdKind, lookup: Callable[[str], int] | None) -> int:
    if name == "root":
        return 0
    try:
        if name and not control_character(name):
            return (lookup or (_uid if kind == "uid" else _gid))(name)
    except (KeyError, ImportError):
        pass
    raise ConfigError(f"{kind} {name[:80]!r} is neither a number nor a name that this machine knows")


def _uid(name: str) -> int:
    import pwd  # not on every platform

    return pwd.getpwnam(name).pw_uid


def _gid(name: str) -> int:
    import grp

    return grp.getgrnam(name).gr_gid


def _listed(key: str, value: object) -> list[Any]:
    if isinstance(value, str):
        items = [item.strip() for item in value.split(",") if item.strip()]
        if value.strip() and not items:
            raise ConfigError(f"{key}: {value!r} names nothing")
        return items
    if isinstance(value, (Sequence, frozenset, set)) and not isinstance(value, (bytes, bytearray)):
        return list(value)
    raise ConfigError(f"{key}: {value!r} is neither a list nor a text separated by commas")


def _users(key: str, value: object) -> frozenset[str]:
    names = _listed(key, value)
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise ConfigError(f"{key}: every user name must be a text and not empty")
    return frozenset(name.strip() for name in names)


def _ids(key: str, value: object) -> frozenset[int]:
    kind: IdKind = "uid" if key == "prohibited_uids" else "gid"
    try:
        return frozenset(normalise_id(item, kind) for item in _listed(key, value))
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def _ports(key: str, value: object) -> PortRange:
    if not isinstance(value, (str, PortRange)):
        raise ConfigError(f"{key}: {value!r} is not LOW..HIGH, such as 40000..41999")
    return value if isinstance(value, PortRange) else PortRange.parse(value)


def _count(key: str, value: object) -> int:
    least = 1 if key == "max_kernels_per_user" else 0
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{key}: {value!r} is not a whole number of at least {least}")
    return value


def _seconds(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"{key}: {value!r} is not a number of seconds above 0")
    return float(value)


def _flag(key: str, value: object) -> bool:
    flag = {"true": True, "false": False}.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(flag, bool):
        raise ConfigError(f"{key}: {value!r} is neither true nor false")
    return flag


def _in_both(ours: frozenset[str], theirs: frozenset[str]) -> frozenset[str]:
    return ours & theirs if ours and theirs else ours | theirs  # an empty one means everybody


def _lower(ours: int | None, theirs: int) -> int:
    return theirs if ours is None else min(ours, theirs)


_RULES: dict[str, tuple[Callable[[str, object], Any], Callable[[Any, Any], Any]]] = {
    "authorized_users": (_users, _in_both),
    "unauthorized_users": (_users, frozenset.union),
    "prohibited_uids": (_ids, frozenset.union),
    "prohibited_gids": (_ids, frozenset.union),
    "port_range": (_ports, PortRange.narrowed),
    "min_port_range_size": (_count, max),
    "max_kernels_per_user": (_count, _lower),
    "launch_timeout_cap": (_seconds, min),
    "impersonation_enabled": (_flag, operator.or_),
}
"""How to read each key, and how to narrow the operator's value by the kernelspec's."""


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: read(key, config[key]) for key, (read, _) in _RULES.items() if config.get(key) is not None}


def _check_ports(policy: Policy) -> None:
    ports, least = policy.port_range, policy.min_port_range_size
    if not ports.is_any and (size := ports.high - ports.low + 1) < least:
        raise ConfigError(f"port_range {ports} has {size} ports; at least {least} are required")


@hookimpl(trylast=True)
def gp_confirm_startup(kernel: KernelInfo, status: Status, elapsed: float) -> Verdict:
    """Fail a start whose job is gone or cannot heal; wait otherwise, also while the platform is silent."""
    if status.state is State.GONE or status.terminal:
        return FAIL(status.reason or (PLATFORM_FAILED if status.detail else LAUNCHER_DIED), status.detail)
    return WAIT
