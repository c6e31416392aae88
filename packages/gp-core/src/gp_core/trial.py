"""Bind what the listener would, for a moment, so that others can try to connect: for ``jupyter gp doctor``."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence

from .errors import ConfigError
from .server import KernelServer


@contextlib.contextmanager
def trial_listener(server: KernelServer) -> Iterator[KernelServer]:
    """Listen where launchers would be told to call, while nobody answers: a connection is all that can be had.

    Args:
        server: Options of the process; nothing of it is open. Its ``port`` is the one that was bound.

    Raises:
        ConfigError: Nothing can be bound; the text says what was tried.
    """
    bound, first = server.bind_addresses(), server.response_port
    last = first + server.response_port_retries if first else first
    problem = OSError()
    with contextlib.ExitStack() as stack:
        for port in range(first, last + 1):
            try:
                server.port = _bind(bound, port, stack)
                break
            except OSError as error:
                problem = error
        else:
            raise ConfigError(f"ports {first} to {last} of {', '.join(bound)} cannot be bound: {problem.strerror}")
        yield server


def _bind(hosts: Sequence[str], port: int, stack: contextlib.ExitStack) -> int:
    with contextlib.ExitStack() as attempt:
        for host in hosts:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = attempt.enter_context(socket.create_server((host, port), family=family))
            port = listener.getsockname()[1]
        stack.push(attempt.pop_all())
    return port
