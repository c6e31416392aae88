"""The kernel: started here as a child, or somebody else's process that we attach to."""

from __future__ import annotations

import os
import sys
import time

from . import files, process
from .command import kernel_argv, kernel_environment, kernel_folder
from .errors import StartError
from .ports import AWAITED, Ports

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .log import Log
    from .options import Options
    from .secrets_input import Secrets

_TAIL = 8192  # bytes of the end of standard error that are kept
_SIGKILL = 9
_CLASHES = ("address already in use", "address in use", "eaddrinuse")
_STARTS = 3  # of one run, when other processes take its ports


class Exit:
    """How a run of the kernel ended.

    Args:
        code: Exit code, negative for a signal, None if nobody knows.
        reason: None, or why it could not even be started.
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
    """What supervisor and kernel have in common, whoever started the process.

    Attributes:
        run: Number of the start.
        pid: Process id, 0 if there is none.
        ports: Its ports, once chosen.
        listened: Whether this run was seen to accept connections.
        exit: How this run ended, None while it lives.
    """

    can_restart = True

    def __init__(self, options: Options, secrets: Secrets, log: Log) -> None:
        self.run = 0
        self.pid = 0
        self.ports: Ports | None = None
        self.listened = False
        self.exit: Exit | None = None
        self.stderr = -1
        self.stderr_tail = b""
        self._options = options
        self._connection = secrets.connection
        self._log = log
        self._folder: files.KernelFolder | None = None
        self._awaited = list(AWAITED)

    def is_listening(self) -> bool:
        """Look whether shell, iopub and control accept; once they do, the ports are the kernel's own business."""
        if self.ports is None:
            return False
        self._awaited = [name for name in self._awaited if not self.ports.accepts(name)]
        if not self._awaited:
            self.ports.release()
            self.listened = True
        return self.listened

    def ended(self, code: int | None) -> None:
        """Take note that the process is gone."""
        self.exit = self.exit or Exit(code)
        if self.ports and self.can_restart:
            self.ports.hold()

    def _write_connection_file(self, path: str) -> None:
        if self._connection is None:
            raise StartError("NoConnectionFile", "the launch secrets have no connection")
        if self.ports is None:
            self.ports = Ports(self._connection, self._options.port_range, os.path.dirname(path))
        from .quickjson import dump_flat

        values: dict[str, Any] = {**self._connection, "ip": self.ports.ip, **self.ports.numbers}
        files.write_private(path, dump_flat(values))


class Kernel(Watched):
    """A kernel that we start, and start again."""

    def __init__(self, options: Options, secrets: Secrets, log: Log) -> None:
        super().__init__(options, secrets, log)
        self._argv = options.argv
        self._env = secrets.env
        self._cwd = options.cwd
        self._child: process.Child | None = None
        self._starts = 0
        self._group = 0  # 0 once nothing of it is left: the number may be given to others

    def start(
        self,
        run: int,
        argv: list[str] | None = None,
        env: dict[str, str] | None = None,
        cwd: str | None = None,
    ) -> None:
        """Start the kernel; a failure is told by `exit`.

        Args:
            run: Number of this start.
            argv: New argv with placeholders; None: as before.
            env: New environment from the server; None: as before.
            cwd: New folder; None: as before.
        """
        self._argv = self._argv if argv is None else argv
        self._env = self._env if env is None else env
        self._cwd = self._cwd if cwd is None else cwd
        self.run = run
        self._starts = 0
        self._start()

    def _start(self, hold: bool = True) -> None:
        self._kill_group()
        self.close_stderr()
        self._starts += 1
        self.pid = 0
        self.listened = False
        self._awaited = list(AWAITED)
        self.exit = None
        self.stderr_tail = b""
        try:
            if self._folder is None:
                self._folder = files.create_folder(
                    self._options.runtime_dir, self._options.kernel_id, os.environ
                )
            path = self._folder.file("connection.json")
            if self.ports is not None:
                self.ports.hold()
            self._write_connection_file(path)  # before every start: ipykernel deletes it when it ends
            if not hold and self.ports is not None:
                self.ports.release()
            self._spawn(path)
        except StartError as error:
            self._log("run %d: %s: %s", self.run, error.reason, error.detail)
            self.exit = Exit(error.code, error.reason, error.detail)

    def _spawn(self, connection_file: str) -> None:
        argv = kernel_argv(self._argv, self._options, connection_file)
        if self._options.spark_context_initialization_mode != "none" or self._options.kernel_class_name:
            from .spark import adapt

            assert self._folder is not None
            argv = adapt(argv, self._options, self._folder.path, self._log)
        env = kernel_environment(os.environ, self._env, self._options.kernel_id)
        folder = kernel_folder(self._cwd, env, self._log)
        try:
            self._child = process.start(argv, env, folder)
        except OSError as error:
            raise StartError("CommandNotFound", "cannot start a process: %s" % error.strerror) from None
        self.pid = self._group = self._child.pid
        self.stderr = self._child.stderr

    def confirm(self) -> None:
        """Wait for the result of exec, which is there long before we have imported what comes next."""
        child, self._child = self._child, None
        if child is None:
            return
        detail = child.confirm()
        if detail:
            self._log("run %d: CommandNotFound: %s", self.run, detail)
            self.exit = Exit(127, "CommandNotFound", detail)
        elif self.ports:
            self._log("run %d: started, pid %d, ports %s", self.run, self.pid, self.ports.numbers)

    def start_again(self) -> bool:
        """If a run died because others took its ports, start it once more and say so.

        The first run gets other ports; later ones keep theirs, since clients know them. The ports are not held this
        time: that may have been the reason, if the kernel does not set SO_REUSEADDR.
        """
        text = self.stderr_tail.decode("utf-8", "replace").lower()
        clash = not self.listened and self._starts < _STARTS and any(words in text for words in _CLASHES)
        if not clash or self.ports is None or self.exit is None or self.exit.reason:
            return False
        self._log("run %d: its ports are taken, trying again", self.run)
        self.ports.release()
        if self.run == 1:
            self.ports = None
        self._start(hold=False)
        return True

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
            self._log.copy(data)
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
        """Take note that the process was reaped."""
        super().ended(code)
        try:
            os.killpg(self._group, 0)  # children that outlive it; they keep the group's number ours
        except OSError:
            self._group = 0

    def destroy(self) -> None:
        """Kill what is left of the kernel and delete its files."""
        self._kill_group()
        self.close_stderr()
        if self.ports:
            self.ports.release()
        if self._folder:
            self._folder.remove()
            self._folder = None

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


class Attached(Watched):
    """A kernel that runs in a process which its caller started: watched, signalled, never started."""

    can_restart = False

    def __init__(self, options: Options, secrets: Secrets, log: Log) -> None:
        super().__init__(options, secrets, log)
        self.pid = options.attach
        self.pidfd = -1

    def start(
        self,
        run: int,
        argv: list[str] | None = None,
        env: dict[str, str] | None = None,
        cwd: str | None = None,
    ) -> None:
        """Write the connection file for which the caller waits; a failure is told by `exit`."""
        self.run = run
        try:
            if sys.platform == "linux" and hasattr(os, "pidfd_open"):
                self.pidfd = os.pidfd_open(self.pid)
        except OSError:
            pass  # gone already, or forbidden in this container: `is_alive` finds out
        try:
            self._write_connection_file(os.path.abspath(self._options.connection_file))
        except StartError as error:
            self._log("%s: %s", error.reason, error.detail)
            self.exit = Exit(error.code, error.reason, error.detail)

    def confirm(self) -> None:
        """Nothing to wait for."""

    def start_again(self) -> bool:
        """It is not ours to start."""
        return False

    def read_stderr(self) -> bool:
        """Its standard error is not ours."""
        return False

    def close_stderr(self) -> None:
        """Its standard error is not ours."""

    def is_alive(self) -> bool:
        """Say whether the process exists and is not a zombie."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass
        try:
            with open("/proc/%d/stat" % self.pid, "rb") as stat:
                return stat.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
        except (OSError, IndexError):
            return True

    def signal(self, number: int) -> bool:
        """Send a signal to the process, not to its group, which is the caller's."""
        import signal

        try:
            if self.pidfd >= 0:
                signal.pidfd_send_signal(self.pidfd, number)  # type: ignore[attr-defined,unused-ignore]
            elif self.exit is None:
                os.kill(self.pid, number)
            return self.exit is None
        except OSError:
            return False

    def destroy(self) -> None:
        """Delete the connection file."""
        if self.ports:
            self.ports.release()
            try:
                os.unlink(self._options.connection_file)
            except OSError:
                pass
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
