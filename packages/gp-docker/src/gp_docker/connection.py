"""Which engine an option means, as the docker command finds it, and a client of that engine."""

from __future__ import annotations

import os
import shutil
import socket
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import docker
from docker.constants import DEFAULT_DOCKER_API_VERSION, DEFAULT_UNIX_SOCKET
from docker.context import ContextAPI
from docker.context.config import get_current_context_name
from docker.utils import kwargs_from_env
from docker.utils.config import find_config_file
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies
from urllib3.connection import HTTPConnection

from gp_core import ConfigError

from .through_ssh import SshAdapter, command_of

LONGEST = 60.0  # seconds that an engine may be silent in one answer
MOST = 64  # connections that are kept open
SCHEMES = ("unix://", "tcp://", "http://", "https://", "ssh://", "npipe://")


@dataclass(frozen=True)
class Endpoint:
    """Where an engine is.

    Args:
        name: That leads there from any process of this user: a context or an address.
        url: Its address.
        tls: How to prove who we are and check who it is; None: not at all.
    """

    name: str
    url: str
    tls: Any = field(default=None, compare=False, repr=False)

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine, as far as anybody can tell."""
        return self.url.startswith(("unix://", "http+unix://", "npipe://"))

    @property
    def host(self) -> str:
        """Name or address of its machine; empty for this one."""
        rest = self.url.partition("://")[2].partition("/")[0].rpartition("@")[2]
        return "" if self.is_local else rest.rpartition(":")[0].strip("[]") or rest


def endpoint(name: str) -> Endpoint:
    """Find an engine; reads files.

    Args:
        name: An address, a docker context, or nothing: ``DOCKER_HOST``, ``DOCKER_CONTEXT``, the context in use.

    Raises:
        ConfigError: There is no such context, or it cannot be read.
    """
    if name.startswith(SCHEMES):
        own = kwargs_from_env() if os.environ.get("DOCKER_HOST") == name else {}
        return Endpoint(name, name, own.get("tls"))
    if not name and (host := os.environ.get("DOCKER_HOST")):
        return Endpoint(host, host, kwargs_from_env().get("tls"))
    try:
        name = name or os.environ.get("DOCKER_CONTEXT") or get_current_context_name() or "default"
        found = None if name == "default" else ContextAPI.get_context(name)
    except Exception as error:  # the library raises bare ones
        raise ConfigError(f"docker context {name!r} cannot be read: {error}") from None
    if name == "default":
        return Endpoint(f"unix://{DEFAULT_UNIX_SOCKET.rpartition('://')[2]}", "unix:///var/run/docker.sock")
    if found is None or not found.Host:
        hint = "" if find_config_file() else ", and docker's library looks for them beside ~/.docker/config.json only"
        raise ConfigError(f"there is no docker context {name!r}: docker context ls shows which there are{hint}")
    return Endpoint(name, str(found.Host), found.TLSConfig)


def connect(where: Endpoint) -> docker.APIClient:
    """Return a client that speaks the newest version of the API that both sides know; asks the engine.

    Raises:
        ConfigError: Something is missing here.
        DockerException: The engine does not answer.
    """
    # "auto" would ask in the constructor, and leave sockets open if nobody answers
    with closing(_client(where, DEFAULT_DOCKER_API_VERSION)) as probe:
        version = probe.version(api_version=False)["ApiVersion"]
    return _client(where, version)


class KeptAlive(HTTPAdapter):
    """Notices within minutes that an engine's machine has gone: for events and pulls the library waits for ever."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        times = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))
        options = [*HTTPConnection.default_socket_options, (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
        options += [
            (socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in times if hasattr(socket, name)
        ]
        super().init_poolmanager(*args, socket_options=options, **kwargs)


def _client(where: Endpoint, version: str) -> docker.APIClient:
    over_ssh = where.url.startswith("ssh://")
    client = docker.APIClient(
        base_url="unix:///ssh" if over_ssh else where.url,
        tls=where.tls or False,
        timeout=LONGEST,
        version=version,
        max_pool_size=MOST,
    )
    if over_ssh:
        if not shutil.which("ssh"):
            raise ConfigError(f"{where.url} needs the ssh command")
        client.mount("http+docker://", SshAdapter(command_of(where.url), LONGEST, MOST))
    elif client.base_url.startswith(("http://", "https://")):
        client.trust_env = False  # else REQUESTS_CA_BUNDLE would take the place of the engine's own authority
        client.proxies.update(get_environ_proxies(client.base_url))
        for scheme in ("http://", "https://"):
            client.mount(scheme, KeptAlive(pool_maxsize=MOST))
    return client
