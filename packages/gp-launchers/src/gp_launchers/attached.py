"""A kernel in a process that its caller started: watched and signalled, never started."""

from __future__ import annotations

import os
import signal

from .errors import StartError
from .kernel import Exit, Watched

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .launch import Launch

# Python 3.9 on Linux; by name, so that a check for 3.8 does not take them for a mistake
_PIDFD_OPEN, _PIDFD_SEND = "pidfd_open", "pidfd_send_signal"


class Attached(Watched):
    """The process of `--attach`; writes the connection file for which the caller waits.

    Args:
        launch: Has its ports.

    Attributes:
        pidfd: Readable once the process has ended; -1 where there is no such thing.
    """

    def __init__(self, launch: Launch) -> None:
        super().__init__(launch)
        self.pid = launch.options.attach
        self.pidfd = -1
        self._file = os.path.abspath(launch.options.connection_file)
        try:
            if hasattr(os, _PIDFD_OPEN):
                self.pidfd = getattr(os, _PIDFD_OPEN)(self.pid)
        except OSError:
            pass  # gone already, or forbidden in this container: `is_alive` finds out
        try:
            launch.write_connection_file(self._file)
        except StartError as error:
            launch.log("%s: %s", error.reason, error.detail)
            self.exit = Exit(error.code, error.reason, error.detail)

    def is_alive(self) -> bool:
        """Say whether the process exists and is not a zombie."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as stat:
                return stat.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
        except (OSError, IndexError):
            return True

    def signal(self, number: int) -> bool:
        """Send a signal to the process, not to its group, which is the caller's."""
        if self.exit is not None:
            return False
        try:
            if self.pidfd >= 0:
                getattr(signal, _PIDFD_SEND)(self.pidfd, number)
            else:
                os.kill(self.pid, number)
            return True
        except OSError:
            return False

    def destroy(self) -> None:
        """Delete the connection file."""
        self.launch.remove_files()
        if self.launch.ports is not None:
            try:
                os.unlink(self._file)
            except OSError:
                pass
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
