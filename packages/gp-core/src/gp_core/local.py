"""The embedded backend: launcher and kernel on this machine, through the whole protocol.

The reference for authors of backends, the base of most tests, and a way to let kernels survive their server.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal as signals
import sys
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import psutil

import gp_launchers

from ._markers import hookimpl
from .backend import Backend, Finding, Handle, LaunchRequest, State, Status
from .command import expanded
from .errors import COMMAND_NOT_FOUND, LaunchFailed
from .identity import Identity
from .provisioner import RemoteProvisioner
from .runtime import blocking
from .server import data_folder
from .store import private_folder

START = "import sys; sys.path.insert(0, {path!r}); from gp_launchers.__main__ import main; sys.exit(main())"
"""Starts the launcher from its package, whose byte code is cached, with no other package in reach."""


OWN = {
    "DISPLAY", "GP_RUNTIME_DIR", "HOME", "IPYTHONDIR", "JAVA_HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_CONFIG_PATH",
    "JUPYTER_DATA_DIR", "JUPYTER_PATH", "JUPYTER_PLATFORM_DIRS", "JUPYTER_RUNTIME_DIR", "LANG", "LANGUAGE",
    "LD_LIBRARY_PATH", "LOGNAME", "PATH", "SHELL", "TERM", "TMPDIR", "TZ", "USER", "VIRTUAL_ENV", "WAYLAND_DISPLAY",
}  # fmt: skip
KEPT_LOGS = 100
PREFIXES = ("CONDA_", "CUDA_", "LC_", "NVIDIA_", "OMP_", "PYTHON", "XDG_")


def _login_environment() -> dict[str, str]:
    """Return what a login on this machine would have; the rest is the server's own, and may be its tokens."""
    return {name: value for name, value in os.environ.items() if name in OWN or name.startswith(PREFIXES)}


class LocalBackend(Backend):
    """Kernels as processes of this machine."""

    name = "local"
    runs_here = True
    bind_address = "127.0.0.1"
    poll_interval = (0.05, 1.0)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._exit_codes: dict[int, int] = {}

    async def launch(self, request: LaunchRequest) -> Handle:
        here = _login_environment()
        if not request.wrapped:
            argv, env = request.command(), {**here, **expanded(request.env, here), **request.secrets}
        else:
            code = START.format(path=str(Path(gp_launchers.__file__).parents[1]))
            launcher = [sys.executable, "-I", "-S", "-c", code, *request.launcher_arguments()]
            argv = [*launcher, "--", *request.argv]
            env = {**here, **request.secrets}
        log = await blocking(self._log_file, request.kernel_id)
        try:
            pid = await blocking(_spawn, argv, env, log)
        except OSError as error:
            text = f"kernel {request.kernel_id}: {argv[0]} cannot be run: {error.strerror}"
            raise LaunchFailed(text, reason=COMMAND_NOT_FOUND) from None
        started = psutil.Process(pid).create_time()
        return {
            "kernel_id": request.kernel_id,
            "pid": pid,
            "started": started,
            "log": str(log),
            "wrapped": request.wrapped,
        }

    async def status(self, handle: Handle) -> Status:
        return self._gone(handle) if _process(handle) is None else Status(state=State.RUNNING)

    def _gone(self, handle: Handle) -> Status:
        code = self._exit_codes.get(handle["pid"], _reap(handle["pid"]))
        if code is not None:
            self._exit_codes[handle["pid"]] = code  # it can be asked for once only
        return Status(state=State.GONE, exit_code=code)

    async def watch(self, handle: Handle) -> AsyncIterator[Status]:
        """Wait for the launcher's end without polling, where the kernel of this machine can tell (Linux)."""
        try:
            descriptor = os.pidfd_open(handle["pid"])
        except (AttributeError, OSError):
            async for status in super().watch(handle):
                yield status
            return
        try:
            status = await self.look(handle)  # after the open: the number may have passed to another process before
            if status.state is State.RUNNING:
                yield status
                ended, loop = asyncio.Event(), asyncio.get_running_loop()
                loop.add_reader(descriptor, ended.set)
                try:
                    await ended.wait()
                finally:
                    loop.remove_reader(descriptor)
            yield self._gone(handle)
        finally:
            os.close(descriptor)

    async def signal(self, handle: Handle, signum: int) -> bool:
        if signum == signals.SIGKILL or (process := _process(handle)) is None:
            return False  # SIGKILL would end the launcher only; terminate does both
        with contextlib.suppress(psutil.Error):
            process.send_signal(signum)  # the launcher hands it on to the kernel
        return True

    async def terminate(self, handle: Handle, *, force: bool) -> None:
        leader = _process(handle)
        # our launcher takes its kernel along; another one may leave children, which keep the number of its session
        processes = [leader] if handle.get("wrapped", True) else await blocking(_session, handle)
        for process in processes:
            if process is not None:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signals.SIGKILL if force else signals.SIGTERM)

    async def logs(self, handle: Handle, *, tail: int = 50) -> str:
        return await blocking(_tail, Path(handle.get("log") or _log_path(handle["kernel_id"])), tail)

    async def discover(self, kernel_id: str | None = None) -> list[Handle]:
        return await blocking(_launchers, kernel_id)

    async def check(self) -> list[Finding]:
        folder = data_folder()
        writable = os.access(next(path for path in (folder, *folder.parents) if path.exists()), os.W_OK)
        advice = "" if writable else "make the folder writable or set GP_DATA_DIR"
        return [Finding(ok=writable, subject="embedded backend", text=f"data folder {folder}", advice=advice)]

    def _log_file(self, kernel_id: str) -> Path:
        folder = data_folder() / "logs"
        private_folder(folder)
        if len(os.listdir(folder)) > 2 * KEPT_LOGS:  # they outlive their kernels, to be read after a failure
            for old in sorted(folder.glob("*.log"), key=_changed)[:-KEPT_LOGS]:
                old.unlink(missing_ok=True)
        return _log_path(kernel_id)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0  # deleted meanwhile by another start


def _log_path(kernel_id: str) -> Path:
    return data_folder() / "logs" / f"{kernel_id}.log"


def _spawn(argv: list[str], env: dict[str, str], log: Path) -> int:
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab") as output:
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, output.fileno(), 1),
            (os.POSIX_SPAWN_DUP2, output.fileno(), 2),
        ]
        try:
            # a session of its own: the terminal's Ctrl-C and hang-up are the server's
            return os.posix_spawnp(argv[0], argv, env, file_actions=actions, setsid=True)
        except NotImplementedError:
            return os.posix_spawnp(argv[0], argv, env, file_actions=actions, setpgroup=0)


def _process(handle: Handle) -> psutil.Process | None:
    """Return the launcher's process, or None if it is gone or the number belongs to another process now."""
    try:
        process = psutil.Process(handle["pid"])
        if abs(process.create_time() - handle["started"]) < 0.1 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    except psutil.Error:
        pass
    return None


def _session(handle: Handle) -> list[psutil.Process]:
    """Return all processes of the session that a command was started in, also without its leader."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == handle["pid"] and process.create_time() >= handle["started"] - 0.1:
                found.append(process)
    return found


def _reap(pid: int) -> int | None:
    try:
        ended, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None  # another process's child: that one gets its exit code
    return os.waitstatus_to_exitcode(status) if ended else None


def _launchers(kernel_id: str | None) -> list[Handle]:
    found: list[Handle] = []
    if not (data_folder() / "server.pem").exists():
        return found  # nothing was ever started, and looking must not make a key
    me, pins = os.getuid(), set(Identity.load(data_folder()).pins)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, IndexError, KeyError):
            if process.uids().real != me or process.status() == psutil.STATUS_ZOMBIE:
                continue
            argv = process.cmdline()
            if "gp_launchers.__main__" not in argv[4]:
                continue
            options = dict(part[2:].split("=", 1) for part in argv if part.startswith("--") and "=" in part)
            identifier = options["kernel-id"]
            ours = pins & set(options["public-key"].split(","))  # else another installation's; a rotation leaves one
            if kernel_id in (None, identifier) and ours:
                started = process.create_time()
                found.append(
                    {"kernel_id": identifier, "pid": process.pid, "started": started, "log": str(_log_path(identifier))}
                )
    return found


def _tail(path: Path, lines: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 64 * 1024))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


class EmbeddedProvisioner(RemoteProvisioner):
    """Selected by ``"provisioner_name": "gp-local-provisioner"``."""

    backend_name = "local"


@hookimpl
def gp_backends() -> Iterable[type[Backend]]:
    """Offer the embedded backend."""
    return [LocalBackend]


@hookimpl
async def gp_discover(backend: Backend, kernel_id: str | None) -> list[Handle]:
    """Ask the backend itself."""
    return await backend.discover(kernel_id)
