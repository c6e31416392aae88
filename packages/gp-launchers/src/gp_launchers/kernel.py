"""A kernel that we started: its runs, how they end, and what it writes to its standard error."""

from __future__ import annotations

import os
import time

from .errors import StartError
from .memory import oom_kills
from .probe import AWAITED, accepts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .launch import Launch
    from .process import Child

_TAIL = 8192  # bytes of the end of standard error that are kept
_SIGKILL = 9
_CLASHES = ("address already in use", "address in use", "eaddrinuse")
_STARTS = 3  # of one run, when other processes take its ports


class Exit:
    """How a run of the kernel ended.

    Args:
        code: Exit code, negative for a signal, None if nobody knows.
        reason: None, or why it could not even be started, or was ended by the system.
        detail: Text that belongs to the reason.
    """

    def __init__(self, code: int | None, reason: str | None = None, detail: str | None = None) -> None:
        self.code = code
        self.reason = reason
        self.detail = detail

    @property
    def status(self) -> int:
        """Exit code for the launcher itself: 128+n for a signal."""
        code = self.code or 0
        return 128 - code if code < 0 else code


class Watched:
    """A kernel, whoever started its process.

    Args:
        launch: Has its ports and files.

    Attributes:
        run: Number of the start.
        pid: Process id, 0 if there is none.
        listened: Whether this run was seen to accept connections.
        exit: How this run ended, None while it lives.
        stderr: Descriptor of its standard error, -1 if there is none to read.
        stderr_tail: The last bytes that it wrote there.
    """

    can_restart = False

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.run = 1
        self.pid = 0
        self.listened = False
        self.exit: Exit | None = None
        self.stderr = -1
        self.stderr_tail = b""
        self._awaited = list(AWAITED)
        self._oom_kills = oom_kills()

    def is_listening(self) -> bool:
        """Look whether shell, iopub and control accept; once they do, the ports are the kernel's own business."""
        ports = self.launch.ports
        if ports is None:
            return False
        self._awaited = [name for name in self._awaited if not accepts(ports, name)]
        if not self._awaited:
            ports.release()
            self.listened = True
        return self.listened

    def ended(self, code: int | None) -> None:
        """Take note that the process is gone."""
        if self.exit is None and code == -_SIGKILL and oom_kills() > self._oom_kills:
            self.exit = Exit(code, "OutOfMemory", "the kernel used up its memory, and the system ended it")
        self.exit = self.exit or Exit(code)


class Kernel(Watched):
    """A kernel that we start, and start again."""

    can_restart = True

    def __init__(self, launch: Launch) -> None:
        super().__init__(launch)
        self._starts = 0
        self._child: Child | None = None
        self._group = 0  # 0 once nothing of it is left: the number may be given to others

    def started(self, outcome: Child | StartError) -> None:
        """Take over a start of the current run, or its failure."""
        self._starts += 1
        self.listened = False
        self._awaited = list(AWAITED)
        self.exit = None
        self.pid = 0
        self.stderr_tail = b""
        self._oom_kills = oom_kills()
        if isinstance(outcome, StartError):
            self.launch.log("run %d: %s: %s", self.run, outcome.reason, outcome.detail)
            self.exit = Exit(outcome.code, outcome.reason, outcome.detail)
        else:
            self._child = outcome
            self.pid = self._group = outcome.pid
            self.stderr = outcome.stderr

    def start(
        self,
        run: int,
        argv: list[str] | None = None,
        env: dict[str, str] | None = None,
        cwd: str | None = None,
    ) -> None:
        """Start the kernel once more; a failure is told by `exit`.

        Args:
            run: Number of this start.
            argv: New argv with placeholders; None: as before.
            env: New additions of the server to the environment; None: as before.
            cwd: New folder; None: as before.
        """
        launch = self.launch
        launch.argv = launch.argv if argv is None else argv
        launch.env = launch.env if env is None else env
        launch.cwd = launch.cwd if cwd is None else cwd
        self.run = run
        self._starts = 0
        self._start()

    def _start(self, hold: bool = True) -> None:
        self._kill_group()
        self.close_stderr()
        try:
            self.started(self.launch.start(hold))
        except StartError as error:
            self.started(error)

    def confirm(self) -> None:
        """Wait for the result of exec, which is there long before we have imported what comes next."""
        child, self._child = self._child, None
        if child is None:
            return
        detail = child.confirm()
        if detail:
            self.launch.log("run %d: CommandNotFound: %s", self.run, detail)
            self.exit = Exit(127, "CommandNotFound", detail)
        elif self.launch.ports is not None:
            self.launch.log("run %d: started, pid %d, ports %s", self.run, self.pid, self.launch.ports.numbers)

    def died_of_ports(self) -> bool:
        """Say whether the run ended before it listened because others have its ports; not more than twice."""
        if self.listened or self._starts >= _STARTS or self.exit is None or self.exit.reason:
            return False
        text = self.stderr_tail.decode("utf-8", "replace").lower()
        return any(words in text for words in _CLASHES)

    def start_elsewhere(self) -> None:
        """Start the same run again: the first with other ports, later ones with theirs, which clients know.

        The ports are not held this time: that may have been the reason, if the kernel does not set SO_REUSEADDR.
        """
        self.launch.log("run %d: its ports are taken, trying again", self.run)
        if self.launch.ports is not None:
            self.launch.ports.release()
        if self.run == 1:
            self.launch.ports = None
        self._start(hold=False)

    def read_stderr(self) -> bool:
        """Copy what the kernel wrote to its standard error; return False at its end."""
        for _ in range(16):  # not for ever: a kernel that never stops writing must not stop us
            try:
                data = os.read(self.stderr, 65536)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            self.launch.log.copy(data)
            self.stderr_tail = (self.stderr_tail + data)[-_TAIL:]
        return True

    def close_stderr(self) -> None:
        """Stop reading standard error; safe to repeat."""
        if self.stderr >= 0:
            os.close(self.stderr)
            self.stderr = -1

    def signal(self, number: int) -> bool:
        """Send a signal to the kernel's group; return False if there is nothing left to send it to."""
        if not self._group:
            return False
        try:
            os.killpg(self._group, number)
            return True
        except PermissionError:
            pass  # macOS, or a group with somebody else's process in it: at least the kernel itself
        except OSError:
            return False
        try:
            os.kill(self.pid, number)
            return True
        except OSError:
            return False

    def ended(self, code: int | None) -> None:
        """Take note that the process was reaped; its ports are kept for a restart."""
        super().ended(code)
        if self.launch.ports is not None:
            self.launch.ports.hold()
        try:
            os.killpg(self._group, 0)  # children that outlive it; they keep the group's number ours
        except OSError:
            self._group = 0

    def destroy(self) -> None:
        """Kill what is left of the kernel and delete its files."""
        self._kill_group()
        self.close_stderr()
        self.launch.remove_files()

    def _kill_group(self) -> None:
        if not self._group:
            return
        self.signal(_SIGKILL)
        self._group = 0
        for _ in range(200):  # 2 s: then it hangs in the system, and waiting helps nobody
            try:
                if os.waitpid(self.pid, os.WNOHANG)[0]:
                    return
            except OSError:
                return  # reaped before
            time.sleep(0.01)
