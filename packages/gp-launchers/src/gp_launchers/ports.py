"""Choose the kernel's ports by binding them, and hold them until the kernel has them."""

from __future__ import annotations

import _socket
import errno
import os
import sys

from .errors import StartError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping

NAMES = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")
_TAKEN = (errno.EADDRINUSE, errno.EACCES)
PATH_MAX = 107 if sys.platform == "linux" else 103


class Ports:
    """The ports (or socket paths) of one kernel.

    Args:
        connection: Template of the connection file: `transport`, `ip` and the five ports, 0 = any.
        port_range: `(low, high)`, `(0, 0)` = any.
        folder: Where socket paths go if the template names no prefix; if it is too long for them, tcp is used.

    Raises:
        StartError: NoPort.
    """

    def __init__(self, connection: Mapping[str, Any], port_range: tuple[int, int], folder: str) -> None:
        self.ipc = connection.get("transport") == "ipc"
        given = connection.get("ip")
        if self.ipc and not given and len(os.fsencode(folder)) + len("/ipc-1000") > PATH_MAX:
            self.ipc = False  # nobody named a path, so nobody minds
        self.ip = str(given or (os.path.join(folder, "ipc") if self.ipc else "127.0.0.1"))
        self.numbers: dict[str, int] = {}
        self._held: list[_socket.socket] = []
        wanted = {name: _number(connection.get(name)) for name in NAMES}
        try:
            if self.ipc:
                self._choose_paths(wanted)
            else:
                self._choose_numbers(wanted, port_range)
        except BaseException:
            self.release()
            raise

    def hold(self) -> None:
        """Bind the chosen ports again, so that nobody else gets them while the kernel is away."""
        if self.ipc:
            from .probe import path_is_free

            for number in self.numbers.values():
                path_is_free(self.path(number))  # unlinks what the last kernel left
        elif not self._held:
            for number in self.numbers.values():
                try:
                    self._held.append(self._bind(number, True))
                except OSError:
                    pass
            self._keep_or_release()

    def release(self) -> None:
        """Let go of the ports: the kernel has them, or shall have them."""
        while self._held:
            self._held.pop().close()

    def _choose_numbers(self, wanted: Mapping[str, int], port_range: tuple[int, int]) -> None:
        candidates = list(range(port_range[0], port_range[1] + 1)) if port_range[1] else []
        for name in NAMES:
            if wanted[name] and wanted[name] not in self.numbers.values() and self._take(name, wanted[name], True):
                continue
            if not port_range[1]:
                self._take(name, 0, False)
                continue
            while candidates and not self._take(name, _draw(candidates), False):
                pass
            if name not in self.numbers:
                raise StartError("NoPort", f"no free port left in {port_range[0]}..{port_range[1]} on {self.ip}")
        self._keep_or_release()

    def _take(self, name: str, number: int, shared: bool) -> bool:
        try:
            held = self._bind(number, shared)
        except OSError as error:
            if number and error.errno in _TAKEN:
                return False
            raise StartError("NoPort", f"cannot bind on {self.ip}: {error.strerror or error}") from None
        self._held.append(held)
        self.numbers[name] = held.getsockname()[1]
        return True

    def _bind(self, number: int, shared: bool) -> _socket.socket:
        """Bind a port; ``shared``: also one with connections of a former kernel, or one held by another launcher."""
        bound = _socket.socket(self.family(), _socket.SOCK_STREAM)
        try:
            if shared:
                bound.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
            bound.bind(("0.0.0.0" if self.ip == "*" else self.ip, number))
        except BaseException:
            bound.close()
            raise
        return bound

    def _keep_or_release(self) -> None:
        """Go on holding the ports where a kernel can bind them all the same.

        Linux lets two sockets have a port if both set SO_REUSEADDR and only one listens; ZeroMQ, Java and Go set it.
        So no other process, nor fifty launchers started together, gets one of these ports before the kernel does.
        """
        for held in self._held:
            held.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        if sys.platform != "linux" or not self._held:
            return self.release()
        try:
            trial = self._bind(self._held[0].getsockname()[1], True)
            try:
                trial.listen(1)
            finally:
                trial.close()
        except OSError:
            self.release()

    def _choose_paths(self, wanted: Mapping[str, int]) -> None:
        from .probe import path_is_free

        number = 0
        for name in NAMES:
            choice = wanted[name]
            while not choice or choice in self.numbers.values() or not path_is_free(self.path(choice)):
                number += 1
                if number > 1000:
                    raise StartError("NoPort", f"no free socket path {self.ip}-N")
                choice = number
            self.numbers[name] = choice

    def chosen(self) -> dict[str, Any]:
        """Return what was chosen, as a connection file has it."""
        return {"transport": "ipc" if self.ipc else "tcp", "ip": self.ip, **self.numbers}

    def path(self, number: int) -> str:
        """Return the socket path that a number stands for."""
        path = f"{self.ip}-{number}"
        if len(os.fsencode(path)) > PATH_MAX:
            raise StartError("NoPort", f"the socket path {path} has more than {PATH_MAX} bytes")
        return path

    def family(self) -> int:
        """Return the address family of the tcp ports."""
        return _socket.AF_INET6 if ":" in self.ip else _socket.AF_INET


def _number(value: Any) -> int:
    try:
        return max(0, int(value or 0))
    except (TypeError, ValueError):
        return 0


def _draw(candidates: list[int]) -> int:
    """Take a random number out of a list (`random` costs 5 ms to import)."""
    index = int.from_bytes(os.urandom(4), "big") % len(candidates)
    candidates[index], candidates[-1] = candidates[-1], candidates[index]
    return candidates.pop()
