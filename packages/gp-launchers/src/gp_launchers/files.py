"""The private folder of a kernel and the files in it."""

from __future__ import annotations

import os
import stat

from .errors import StartError, storage_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Mapping


class KernelFolder:
    """A 0700 folder for one kernel; whoever holds its lock is alive.

    Args:
        path: Folder that exists and belongs to us.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        lock(self._descriptor)

    def remove(self) -> None:
        """Delete it with all that is in it, and whatever launchers that were killed left beside it."""
        from . import cleanup

        cleanup.remove_tree(self.path)
        os.close(self._descriptor)
        cleanup.sweep(os.path.dirname(self.path))


def create_folder(option: str, kernel_id: str, environ: Mapping[str, str]) -> KernelFolder:
    """Make the private folder of a kernel below the runtime folder.

    Args:
        option: `--runtime-dir`, may be empty.
        kernel_id: Gives the folder its name.
        environ: Environment of the launcher.

    Raises:
        StartError: NoSpace or NoConnectionFile.
    """
    base, chosen = _runtime_folder(option, environ)
    _check_base(base, chosen)
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in kernel_id)[:40]
    path = os.path.join(base, f"{name}-{os.urandom(4).hex()}")
    try:
        os.mkdir(path, 0o700)
        return KernelFolder(path)
    except OSError as error:
        raise storage_error("make the folder", path, error) from None


def write_private(path: str, text: str) -> None:
    """Write a 0600 file so that a reader sees all of it or nothing.

    Raises:
        StartError: NoSpace or NoConnectionFile.
    """
    temporary = f"{path}.{os.urandom(4).hex()}"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            os.fchmod(descriptor, 0o600)  # the umask may have taken the owner's bits
            data = text.encode("utf-8")
            while data:
                data = data[os.write(descriptor, data) :]
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except OSError as error:
        try:
            os.unlink(temporary)
        except OSError:
            pass
        raise storage_error("write", path, error) from None


def _runtime_folder(option: str, environ: Mapping[str, str]) -> tuple[str, bool]:
    """Return the folder and whether somebody chose it by name."""
    explicit = option or environ.get("GP_RUNTIME_DIR", "")
    if explicit:
        return os.path.abspath(explicit), True
    session = environ.get("XDG_RUNTIME_DIR", "")
    if session and os.path.isdir(session) and os.access(session, os.W_OK):  # after `su` it is somebody else's
        return os.path.join(session, "gp"), False
    return os.path.join(environ.get("TMPDIR") or "/tmp", f"gp-{os.geteuid()}"), False


def _check_base(base: str, chosen: bool) -> None:
    try:
        os.makedirs(base, 0o700, exist_ok=True)
        found = os.lstat(base) if not chosen else os.stat(base)
    except FileExistsError:
        raise StartError("NoConnectionFile", f"{base} is not a folder") from None
    except OSError as error:
        raise storage_error("make the folder", base, error) from None
    mine = found.st_uid == os.geteuid()
    advice = "choose another one with --runtime-dir or GP_RUNTIME_DIR"
    if not stat.S_ISDIR(found.st_mode):
        raise StartError("NoConnectionFile", f"{base} is not a folder: {advice}")
    if not mine and not (chosen and found.st_uid == 0):
        raise StartError("NoConnectionFile", f"{base} belongs to user {found.st_uid}: {advice}")
    if chosen:
        # It may be shared, as /tmp is: the kernel's own folder in it is 0700. But nobody may rename that.
        if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
            raise StartError("NoConnectionFile", f"others may write to {base}: {advice}")
    elif found.st_mode & 0o077:
        os.chmod(base, 0o700)


def lock(descriptor: int) -> bool:
    """Lock a folder and say whether that worked; where there are no locks, nothing is ever swept."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (OSError, ImportError):
        return False
