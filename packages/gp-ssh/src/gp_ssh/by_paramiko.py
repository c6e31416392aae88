"""Connections by paramiko: the usual ones."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable

import paramiko
from paramiko.hostkeys import InvalidHostKey

from gp_core import BackendError, Reason

from .connection import (
    COMMAND,
    HOST_KEY_CHANGED,
    HOST_KEY_UNKNOWN,
    NOT_ADMITTED,
    UNANSWERED,
    UNREACHABLE,
    Answer,
    Connection,
    ConnectionFailed,
    Listener,
    Unanswered,
    end_process,
)
from .hosts import Entry, Target

log = logging.getLogger(__name__)


def _reason_of(error: paramiko.SSHException) -> Reason:
    """Paramiko has no types for these."""
    texts = {"not found in known_hosts": HOST_KEY_UNKNOWN, "No authentication methods available": NOT_ADMITTED}
    return next((reason for text, reason in texts.items() if text in str(error)), UNREACHABLE)


class ParamikoConnection(Connection):
    """A connection in this process.

    Args:
        target: Where it goes.
        through: The connection that it goes through.
    """

    def __init__(self, target: Target, through: ParamikoConnection | None = None) -> None:
        self.target = target
        self.through = through
        self._global = threading.Lock()  # paramiko mixes up the answers to global requests of several threads
        self._arrivals: dict[int, Callable[[paramiko.Channel], object]] = {}
        self._client = client = paramiko.SSHClient()
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        self._proxy: Proxy | None = None
        for path in target.known_hosts:
            try:
                client.load_system_host_keys(path)  # read, and never written
            except FileNotFoundError:
                pass
            except (OSError, ValueError, InvalidHostKey) as error:
                log.warning("%s is read no further, hosts may seem to be unknown: %s", path, error)
        try:
            self._open(client)
        except BaseException:
            self.close()
            raise

    @property
    def transport(self) -> paramiko.Transport:
        """Paramiko's object."""
        transport = self._client.get_transport()
        if transport is None or not self.is_open:
            raise ConnectionFailed(f"the connection to {self.target.name} is lost", UNREACHABLE)
        return transport

    @property
    def is_open(self) -> bool:
        transport = self._client.get_transport()
        return transport is not None and transport.is_active()

    def _open(self, client: paramiko.SSHClient) -> None:
        target = self.target
        try:
            client.connect(
                target.host_key_name or target.hostname,
                port=22 if target.host_key_name else target.port,  # with `sock` only for known_hosts, as ssh does
                username=target.user,
                password=target.client.password(),
                sock=self._socket(),
                key_filename=list(target.identity_files) or None,  # type: ignore[arg-type]  # the stubs know only one
                allow_agent=not target.identities_only,
                look_for_keys=False,
                timeout=target.timeout,
                banner_timeout=target.timeout,
                auth_timeout=target.timeout,
                channel_timeout=target.timeout,
            )
        except paramiko.BadHostKeyException as error:
            offered = f"{error.key.get_name()} {error.key.fingerprint}"
            raise ConnectionFailed(
                f"{target.name} has another host key than before: {offered}", HOST_KEY_CHANGED
            ) from None
        except paramiko.AuthenticationException as error:
            wanted = f"; it takes {', '.join(error.allowed_types)}" if hasattr(error, "allowed_types") else ""
            text = f"{target.name} does not let {target.user} in: {str(error).partition(';')[0]}{wanted}"
            raise ConnectionFailed(text, NOT_ADMITTED) from None
        except paramiko.SSHException as error:
            reason = _reason_of(error)
            said = self._proxy.said() if self._proxy is not None and reason is UNREACHABLE else ""
            raise ConnectionFailed(f"{target.name}: {said or error}", reason) from None
        except (OSError, EOFError) as error:
            text = f"{target.name} ({target.hostname} port {target.port}): {getattr(error, 'strerror', None) or error}"
            raise ConnectionFailed(text, UNREACHABLE) from None
        self.transport.set_keepalive(int(UNANSWERED / 3))

    def _socket(self) -> paramiko.Channel | socket.socket:
        target = self.target
        if self.through is not None:
            there = (target.hostname, target.port)
            return self.through.transport.open_channel("direct-tcpip", there, ("127.0.0.1", 0), timeout=target.timeout)
        if target.proxy_command:
            self._proxy = Proxy(target)
            return self._proxy.socket
        made = socket.create_connection((target.hostname, target.port), target.timeout)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNANSWERED * 1000))
        return made

    def run(self, line: str, data: bytes, timeout: float) -> Answer:
        deadline = time.monotonic() + timeout
        try:
            channel = self._channel(deadline)
            with contextlib.closing(channel):
                channel.settimeout(timeout)
                channel.exec_command(COMMAND)
                channel.sendall(line.encode("utf-8", "surrogateescape") + b"\n" + data)
                channel.shutdown_write()
                output = self._read(channel, deadline)
                errors = channel.makefile_stderr().read()
                if not channel.status_event.wait(max(0.01, deadline - time.monotonic())):
                    raise TimeoutError
                return Answer(channel.recv_exit_status(), output, errors)
        except (paramiko.SSHException, OSError, EOFError) as error:
            if isinstance(error, TimeoutError):
                raise Unanswered(self.target.name, timeout) from None
            raise ConnectionFailed(f"{self.target.name}: {error}", UNREACHABLE) from None

    def check(self) -> None:
        with self._global:
            self.transport.global_request("keepalive@openssh.com", wait=True)
        if not self.is_open:
            raise ConnectionFailed(f"the connection to {self.target.name} is lost", UNREACHABLE)

    def forward(self, port: int, listener: Listener) -> int:
        try:
            with self._global:
                port = self.transport.request_port_forward("127.0.0.1", port, self._arrived)
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise BackendError(str(error)) from None
        self._arrivals[port] = listener.add
        return port

    def cancel(self, port: int) -> None:
        self._arrivals.pop(port, None)
        with contextlib.suppress(BackendError, paramiko.SSHException, OSError, EOFError), self._global:
            # paramiko's own method forgets the handler of all other ports, too
            self.transport.global_request("cancel-tcpip-forward", ("127.0.0.1", port), wait=True)

    def _arrived(self, channel: paramiko.Channel, origin: object, server: tuple[str, int]) -> None:
        # paramiko knows one handler, whatever the number of ports
        self._arrivals.get(server[1], paramiko.Channel.close)(channel)

    def _channel(self, deadline: float) -> paramiko.Channel:
        while True:
            try:
                return self.transport.open_session(timeout=max(0.1, deadline - time.monotonic()))
            except paramiko.SSHException:  # MaxSessions of the host may be smaller than ours
                if not self.is_open or time.monotonic() > deadline - 0.1:
                    raise
                time.sleep(0.05)

    @staticmethod
    def _read(channel: paramiko.Channel, deadline: float) -> bytes:
        pieces: list[bytes] = []
        while True:
            channel.settimeout(max(0.01, deadline - time.monotonic()))
            piece = channel.recv(65536)
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)

    def close(self) -> None:
        self._client.close()
        if self._proxy is not None:
            self._proxy.close()


class Proxy:
    """A process whose input and output are the connection: ``ProxyCommand``, run as ssh runs it.

    Paramiko's own fills in nothing, turns in circles at the end of the output, and dies of the terminal's Ctrl-C.

    Args:
        target: Where the connection goes.
    """

    def __init__(self, target: Target) -> None:
        words = {"%": "%", "h": target.hostname, "n": Entry.read(target.name).host}
        words |= {"p": str(target.port), "r": target.user}
        command = re.sub("%(.)", lambda found: words.get(found[1], found[0]), target.proxy_command)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this
        self.socket, end = socket.socketpair()
        shell = os.environ.get("SHELL") or "/bin/sh"
        try:
            self._process = subprocess.Popen(
                [shell, "-c", f"exec {command}"],
                stdin=end.fileno(),
                stdout=end.fileno(),
                stderr=self._errors,
                start_new_session=True,
            )
        except OSError:
            self.socket.close()
            self._errors.close()
            raise
        finally:
            end.close()
        threading.Thread(target=self._process.wait, name="gp-ssh proxy", daemon=True).start()  # leaves no zombie

    def said(self) -> str:
        """Return the last line of what it has complained of."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def close(self) -> None:
        """End it."""
        self.socket.close()
        end_process(self._process)
        self._errors.close()
