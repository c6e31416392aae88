"""Delete what a kernel leaves, and what launchers left that were killed."""

from __future__ import annotations

import os
import stat
import time

from .files import lock

_NEW = 60.0  # seconds for which nobody sweeps a folder that is not locked (yet)


def remove_tree(path: str) -> None:
    """Delete a folder and what is in it; what cannot be deleted stays."""
    try:
        entries = list(os.scandir(path))
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            remove_tree(entry.path)
        else:
            _unlink(entry.path)
    try:
        os.rmdir(path)
    except OSError:
        pass


def sweep(base: str) -> None:
    """Delete kernel folders whose launcher was killed: they hold keys. A launcher alive keeps its folder locked."""
    try:
        entries = list(os.scandir(base))
    except OSError:
        return
    for entry in entries:
        tail = entry.name.rpartition("-")[2]
        if len(tail) != 8 or tail.strip("0123456789abcdef"):
            continue
        try:
            found = entry.stat(follow_symlinks=False)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or time.time() - found.st_mtime < _NEW:
                continue
            descriptor = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            if lock(descriptor):
                remove_tree(entry.path)
        finally:
            os.close(descriptor)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass
