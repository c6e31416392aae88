"""Which hosts there are: what operators and kernelspecs write, and what the user's ssh configuration makes of it."""

from __future__ import annotations

import getpass
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gp_core import ConfigError, Host, blocking, run_command

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:%-]*")  # of a host or user; never an option of ssh, never shell syntax
USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")  # that sudo may be told: a name and no number
ADDRESS = re.compile(
    r"(?:(?P<user>[^@]+)@)?(?:\[(?P<six>[^]]+)\]|(?P<host>[^:]+|[^@:]*:[^@]*:[^@]*?))(?::(?P<port>\d+))?"
)
NONE = ("", "none")


@dataclass(frozen=True)
class Entry:
    """One of ``remote_hosts``.

    Args:
        text: As written: ``host``, ``user@host:port``, ``[IPv6]:port``, or a name from the ssh configuration.
        host: Name or address.
        user: None: as the ssh configuration says.
        port: None: likewise.
        weight: Its share, for ``weighted``.
        labels: For ``host_selector``.
    """

    text: str
    host: str
    user: str | None = None
    port: int | None = None
    weight: float = field(default=1.0, compare=False)
    labels: Mapping[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def read(cls, written: str | Mapping[str, Any]) -> Entry:
        """Read a host as it is written in configuration.

        Raises:
            ConfigError: It is none; the text says what was expected.
        """
        given: dict[str, Any] = {"host": written} if isinstance(written, str) else dict(written)
        text, weight, labels = given.pop("host", None), given.pop("weight", 1.0), given.pop("labels", {})
        if not isinstance(text, str) or given or not isinstance(labels, Mapping):
            raise ConfigError(
                f"remote_hosts: {written!r} is not a host; write 'host', 'user@host:port' or "
                '{"host": …, "weight": …, "labels": {…}}'
            )
        match = ADDRESS.fullmatch(text.strip())
        host = match and (match["six"] or match["host"])
        user = match["user"] if match else None
        if not match or not host or not NAME.fullmatch(host) or (user and not NAME.fullmatch(user)):
            raise ConfigError(f"remote_hosts: {text!r} is not a host; write host, user@host, host:port or [IPv6]:port")
        port = int(match["port"]) if match["port"] else None
        if port is not None and not 0 < port < 65536:
            raise ConfigError(f"remote_hosts: {text!r} has a port that cannot be")
        if not isinstance(weight, (int, float)) or isinstance(weight, bool):
            raise ConfigError(f"remote_hosts: the weight of {text!r} is not a number")
        Host(text, weight)  # refuses what is negative or infinite
        return cls(text.strip(), host, user, port, weight, {str(name): str(value) for name, value in labels.items()})


def entries(written: Sequence[str | Mapping[str, Any]], selector: Mapping[str, str]) -> dict[str, Entry]:
    """Return the hosts that have the labels of a selector, by their text.

    Raises:
        ConfigError: None has.
    """
    every = [Entry.read(one) for one in written]
    fitting = {one.text: one for one in every if selector.items() <= one.labels.items()}
    if not fitting:
        wanted = ", ".join(f"{name}={value}" for name, value in selector.items())
        raise ConfigError(
            f"none of the {len(every)} hosts has the labels of host_selector ({wanted})"
            if every
            else "there are no remote_hosts: name them in the kernelspec's config or by GP_REMOTE_HOSTS"
        )
    return fitting


@dataclass(frozen=True)
class Client:
    """How hosts are reached, for all of an installation.

    Args:
        config: Configuration of ssh; empty: the user's own.
        connector: "paramiko", or "ssh" for the user's own program.
        password_file: File with the password of every host, for paramiko; empty: none.
        password_env: Variable with it; empty: none.
    """

    config: str = ""
    connector: str = "paramiko"
    password_file: str = ""
    password_env: str = ""

    def password(self) -> str | None:
        """Return the password, if there is one; blocks.

        Raises:
            ConfigError: It cannot be read, or others can read it, too.
        """
        if self.password_env:
            if not os.environ.get(self.password_env):
                raise ConfigError(f"password_env: there is no variable {self.password_env}")
            return os.environ[self.password_env]
        if not self.password_file:
            return None
        try:
            with open(self.password_file, encoding="utf-8") as file:
                mode = os.fstat(file.fileno()).st_mode
                password = file.read().rstrip("\r\n")
        except OSError as error:
            raise ConfigError(f"password_file {self.password_file} cannot be read: {error.strerror}") from None
        if mode & 0o077:
            path = self.password_file
            raise ConfigError(f"password_file {path} can be read by other users: chmod 600 {path}")
        return password


@dataclass(frozen=True)
class Target:
    """Where and how to connect, all of it resolved; equal ones share a connection.

    Args:
        name: As the user writes it, for texts.
        hostname: To connect to.
        port: Of its sshd.
        user: To log in as.
        identity_files: Private keys to try, if they exist.
        identities_only: Ask no agent for others.
        known_hosts: Files with host keys.
        host_key_name: What the host is called in them, whatever its port; empty: as usual.
        proxy_jump: ``user@host:port`` of the host to go through; empty: none.
        proxy_command: Command whose input and output are the connection; empty: none.
        timeout: Seconds to connect.
        client: How it is reached.
        by_ssh: Last arguments of the user's own ssh, if that makes the connection; else empty.
        control_path: Socket of a connection that a person may have opened by it; empty: none.
    """

    name: str = field(compare=False)
    hostname: str
    port: int
    user: str
    identity_files: tuple[str, ...] = ()
    identities_only: bool = False
    known_hosts: tuple[str, ...] = ()
    host_key_name: str = ""
    proxy_jump: str = ""
    proxy_command: str = ""
    timeout: float = 10.0
    client: Client = Client()
    by_ssh: tuple[str, ...] = ()
    control_path: str = ""


async def resolve(entry: Entry, client: Client) -> Target:
    """Let ssh itself say what its configuration makes of a host: no library follows all of it.

    Args:
        entry: The host.
        client: How it is reached.

    Raises:
        ConfigError: The configuration is wrong.
    """
    if shutil.which("ssh") is None:  # no client here, so nobody has a configuration for it
        if client.connector == "ssh":
            raise ConfigError("connector ssh: there is no ssh here: install openssh-client")
        user = entry.user or getpass.getuser()
        return Target(entry.text, entry.host, entry.port or 22, user, **_defaults(entry), client=client)
    options = [*(["-F", client.config] if client.config else []), *(["-l", entry.user] if entry.user else [])]
    options += [*(["-p", str(entry.port)] if entry.port else []), "--", entry.host]
    done = await run_command("ssh", "-G", *options, timeout=10)
    if done.code != 0:
        raise ConfigError(f"host {entry.text}: the ssh configuration cannot be used: {done.output.strip()}")
    target = await blocking(_target, entry, done.output)  # it looks for keys in a home that may be far away
    return replace(target, client=client, by_ssh=tuple(options) if client.connector == "ssh" else ())


def _defaults(entry: Entry) -> dict[str, Any]:
    return {"known_hosts": (str(Path.home() / ".ssh/known_hosts"),)}


def _target(entry: Entry, output: str) -> Target:
    said: dict[str, list[str]] = {}
    for line in output.splitlines():
        name, _, value = line.partition(" ")
        said.setdefault(name, []).append(value.strip())

    def one(name: str, default: str = "") -> str:
        value = said.get(name, [default])[0]
        return default if value.lower() in NONE else value

    files = [*one("userknownhostsfile").split(), *one("globalknownhostsfile").split()]
    keys = [os.path.expanduser(path) for path in said.get("identityfile", [])]
    return Target(
        name=entry.text,
        hostname=one("hostname", entry.host),
        port=int(one("port", "22")),
        user=one("user") or getpass.getuser(),
        identity_files=tuple(path for path in keys if os.path.exists(path)),
        identities_only=one("identitiesonly") == "yes",
        known_hosts=tuple(os.path.expanduser(path) for path in files),
        host_key_name=one("hostkeyalias"),
        proxy_jump=one("proxyjump"),
        proxy_command=one("proxycommand"),
        timeout=float(one("connecttimeout") or 10),
        control_path=one("controlpath"),
    )
