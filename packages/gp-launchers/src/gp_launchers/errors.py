"""Why a kernel could not be started, in the words of the session (`exited.reason`)."""

from __future__ import annotations

import errno

CODES = {"CommandNotFound": 127, "NoPort": 69, "NoSpace": 73, "NoConnectionFile": 78}

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class StartError(Exception):
    """A kernel could not be started.

    Args:
        reason: Key of `CODES`.
        detail: Text for people; never a secret.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.code = CODES[reason]


def storage_error(what: str, path: str, error: OSError) -> StartError:
    """Return the error for a file or folder that cannot be written."""
    reason = "NoSpace" if error.errno in _NO_SPACE else "NoConnectionFile"
    return StartError(reason, f"cannot {what} {path}: {error.strerror or error}")
