"""Start a program as a child that dies with us, by hand: `subprocess` costs 15 ms to import."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` imports `enum`: 5 ms
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Mapping, NoReturn, Sequence

_PR_SET_PDEATHSIG = 1


class Child:
    """A started program.

    Attributes:
        pid: Its process id, also that of its group and session.
        stderr: Descriptor (not blocking) from which its standard error is read.
    """

    def __init__(self, pid: int, stderr: int, errors: int) -> None:
        self.pid = pid
        self.stderr = stderr
        self._errors = errors

    def confirm(self) -> str:
        """Wait until the program runs; return why it cannot, or nothing."""
        text = b""
        while True:
            part = os.read(self._errors, 4096)
            if not part:
                break
            text += part
        os.close(self._errors)
        return text.decode("utf-8", "replace")


def start(argv: Sequence[str], env: Mapping[str, str], folder: str) -> Child:
    """Start a program in a session of its own, without any descriptor of ours but 1 and a pipe as 2.

    Args:
        argv: Program and arguments; the program is looked up in the PATH of ``env``.
        env: Its whole environment.
        folder: Where it starts; empty: here.

    Raises:
        OSError: There can be no pipe or no process.
    """
    die_with_parent = _parent_death_signal()
    stderr_read, stderr_write = os.pipe()
    errors_read, errors_write = os.pipe()
    launcher = os.getpid()
    try:
        pid = os.fork()
    except OSError:
        for descriptor in (stderr_read, stderr_write, errors_read, errors_write):
            os.close(descriptor)
        raise
    if pid == 0:
        try:
            _become(argv, env, folder, launcher, die_with_parent, stderr_write, errors_write)
        except BaseException as error:
            text = "{}: {}".format(argv[0], getattr(error, "strerror", None) or error)
            os.write(errors_write, text.encode("utf-8", "replace")[:4096])
        finally:
            os._exit(127)
    os.close(stderr_write)
    os.close(errors_write)
    os.set_blocking(stderr_read, False)
    return Child(pid, stderr_read, errors_read)


def _become(
    argv: Sequence[str],
    env: Mapping[str, str],
    folder: str,
    launcher: int,
    die_with_parent: Callable[[], object],
    stderr: int,
    errors: int,
) -> NoReturn:
    os.setsid()
    die_with_parent()
    if os.getppid() != launcher:  # it died before it was watched
        os._exit(1)
    # Ignored signals and the mask outlive exec; shells start background jobs without SIGINT, Python ignores SIGPIPE.
    for number in range(1, _signal.NSIG):
        try:
            if _signal.getsignal(number) == _signal.SIG_IGN:
                _signal.signal(number, _signal.SIG_DFL)
        except (OSError, ValueError):
            pass
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(stderr, 2)
    for descriptor in _open_descriptors():
        if descriptor > 2 and descriptor != errors:
            try:
                os.close(descriptor)
            except OSError:
                pass
    if folder:
        os.chdir(folder)
    _exec(argv, env)


def _exec(argv: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    folders = [""] if "/" in argv[0] else env.get("PATH", os.defpath).split(os.pathsep)
    refused: OSError | None = None
    for folder in folders:
        try:
            os.execve(os.path.join(folder, argv[0]), list(argv), dict(env))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            refused = refused or error
    raise refused or FileNotFoundError(2, "command not found" if folders != [""] else "no such file")


def _open_descriptors() -> list[int]:
    for listing in ("/proc/self/fd", "/dev/fd"):
        try:
            return [int(name) for name in os.listdir(listing)]
        except (OSError, ValueError):
            pass
    return list(range(256))


def _parent_death_signal() -> Callable[[], object]:
    """Return what the child calls so that the kernel kills it when we are gone (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        try:
            import _ctypes  # `ctypes` itself costs 3 ms; before the fork, since an import may take locks

            prctl = _ctypes.dlsym(_ctypes.dlopen(None, 0), "prctl")  # type: ignore[arg-type]
            return lambda: _ctypes.call_function(prctl, (_PR_SET_PDEATHSIG, 9, 0, 0, 0))
        except (ImportError, OSError, AttributeError):
            pass  # a Python without ctypes: the kernel's own watch of its parent has to do
    return lambda: None
