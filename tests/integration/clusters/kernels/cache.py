"""What the tests download or build, kept outside the checkout by version; it may be deleted at any time."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

_COMPLETE = ".complete"


def cache_root() -> Path:
    """The cache folder: `GP_TEST_CACHE`, else `gp-tests` in the user's XDG cache folder."""
    if own := os.environ.get("GP_TEST_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gp-tests"


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """Return a cached folder, building it first where it is missing or was left half done.

    Runs at the same time wait for each other.

    Args:
        name: The folder's name; it must hold the versions of everything that went in.
        build: Fills the folder it is given. It is built in place, as virtual environments demand.
    """
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    folder = root / name
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / _COMPLETE).exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            build(folder)
            (folder / _COMPLETE).touch()
    return folder
