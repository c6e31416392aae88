"""Engines that are reached by ssh: each connection is a process of the user's own ssh, as for the docker command.

The library has such connections, too, but they ask for port 22 whatever ~/.ssh/config says, wait without end for an
engine that hangs, and keep what ssh said to themselves.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import shlex
import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from docker.transport.basehttpadapter import BaseHTTPAdapter
from requests import PreparedRequest
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool

from gp_core import ConfigError

OPTIONS = ("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15")
ENDED = 1.0  # seconds for an ssh whose connection has broken to end, so that its last words are heard


def command_of(url: str) -> list[str]:
    """Return the command whose input and output are a connection to the engine.

    Args:
        url: ``ssh://[USER@]HOST[:PORT][/PATH/OF/ITS/SOCKET]``.

    Raises:
        ConfigError: It is none of these.
    """
    try:
        parts = urlsplit(url)
        user, port = parts.username, parts.port
    except ValueError as error:
        raise ConfigError(f"{url}: {error}") from None
    host = re.sub(r":\d*$", "", parts.netloc.rpartition("@")[2]).strip("[]")  # as it is written, unlike hostname
    if not host or parts.password or parts.query or parts.fragment:
        raise ConfigError(f"{url} is not ssh://[USER@]HOST[:PORT][/PATH]")
    who = [*(("-l", user) if user else ()), *(("-p", str(port)) if port else ())]
    path = parts.path.rstrip("/")
    where = f" --host unix://{shlex.quote(path)}" if path else ""
    return ["ssh", *OPTIONS, *who, "--", host, f"docker{where} system dial-stdio"]


class SshAdapter(BaseHTTPAdapter):  # type: ignore[misc]
    """What a `docker.APIClient` sends its requests through.

    Args:
        command: Of `command_of`.
        timeout: Seconds that an engine may be silent.
        most: Connections that are kept open.
    """

    def __init__(self, command: list[str], timeout: float, most: int) -> None:
        self._pool = _Pool(command, timeout, most)
        super().__init__()

    def get_connection(self, url: str | bytes, proxies: Any = None) -> HTTPConnectionPool:
        return self._pool

    def request_url(self, request: PreparedRequest, proxies: Any) -> str:
        return str(request.path_url)

    def close(self) -> None:
        super().close()
        self._pool.close()


class _Pool(HTTPConnectionPool):
    def __init__(self, command: list[str], timeout: float, most: int) -> None:
        super().__init__("localhost", timeout=timeout, maxsize=most)
        self._command = command

    def _new_conn(self) -> HTTPConnection:
        return _Connection(self._command, self.timeout.connect_timeout)


class _Connection(HTTPConnection):
    """One connection, and its process, which ends with the last user of the socket."""

    def __init__(self, command: list[str], timeout: Any) -> None:
        super().__init__("localhost", timeout=timeout)
        self._command = command
        self._ssh: _Ssh | None = None

    def connect(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._ssh = _Ssh(self._command, theirs)
        ours.settimeout(self.timeout)
        self.sock = ours

    def request(self, *args: Any, **kwargs: Any) -> None:
        with self._told():
            super().request(*args, **kwargs)

    def getresponse(self) -> Any:
        with self._told():
            return super().getresponse()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Let a broken connection say what ssh said."""
        try:
            yield
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException) as error:
            words = self._ssh.last_words() if self._ssh is not None else ""
            raise ConnectionError(words or str(error)) from None


class _Ssh(threading.Thread):
    """A process of ssh, and the thread that hears what it says, to the end.

    Args:
        command: To run.
        end: Its input and output.
    """

    def __init__(self, command: list[str], end: socket.socket) -> None:
        super().__init__(daemon=True, name="ssh")
        self._last = ""
        self._process = subprocess.Popen(
            command,
            stdin=end.fileno(),
            stdout=end.fileno(),
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is not for it
        )
        self.start()

    def run(self) -> None:
        with self._process:
            for line in self._process.stderr or ():
                self._last = line.strip() or self._last

    def last_words(self) -> str:
        """Return its last line, once it has ended."""
        self.join(ENDED)
        return self._last
