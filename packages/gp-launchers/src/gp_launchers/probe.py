"""Find out by connecting whether somebody listens."""

from __future__ import annotations

import errno
import os
import select
import socket
import stat

from .errors import StartError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .ports import Ports

AWAITED = ("shell_port", "iopub_port", "control_port")  # those that make a kernel usable
_LOOPBACK = {"*": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def accepts(ports: Ports, name: str) -> bool:
    """Say whether the kernel accepts connections on a port."""
    number = ports.numbers[name]
    try:
        if ports.ipc:
            return _connects(socket.AF_UNIX, ports.path(number))
        return _connects(ports.family(), (_LOOPBACK.get(ports.ip, ports.ip), number))
    except OSError:
        return False


def path_is_free(path: str) -> bool:
    """Say whether a socket path can be bound; unlinks a socket on which nobody listens."""
    try:
        return not _connects(socket.AF_UNIX, path)
    except FileNotFoundError:
        if os.path.isdir(os.path.dirname(path) or "."):
            return True
        raise StartError("NoPort", f"the folder of the socket path {path} does not exist") from None
    except OSError as error:
        if error.errno != errno.ECONNREFUSED:
            return False
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
        os.unlink(path)
        return True
    except OSError:
        return False


def _connects(family: int, address: Any) -> bool:
    """Connect without waiting: on the same machine the answer is there at once.

    Raises:
        OSError: Nobody listens.
    """
    probe = socket.socket(family, socket.SOCK_STREAM)
    try:
        probe.setblocking(False)
        try:
            probe.connect(address)
        except BlockingIOError as error:
            if family == socket.AF_UNIX:
                return True  # EAGAIN: somebody listens, the queue is full
            if error.errno != errno.EINPROGRESS or not _finishes(probe):
                return False
        # A port that nobody holds can be drawn as the source of this very connection, which then meets itself.
        return family == socket.AF_UNIX or probe.getsockname()[:2] != probe.getpeername()[:2]
    finally:
        probe.close()


def _finishes(probe: socket.socket) -> bool:
    poll = select.poll()
    poll.register(probe.fileno(), select.POLLOUT)
    return bool(poll.poll(50)) and probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
