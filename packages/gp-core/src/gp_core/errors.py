"""Everything that can go wrong, as one flat tree, and the typed reasons of a failed start."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, cast


@dataclass(frozen=True)
class Reason:
    """Why a kernel did not start or is gone, in a form that programs and documents can name.

    A backend adds its own as module constants; nothing has to be registered.

    Args:
        code: CamelCase name, stable across versions, such as ``ImagePullBackOff``.
        advice: What the user or the operator can do, one sentence.
    """

    code: str
    advice: str

    def __str__(self) -> str:
        return self.code


KERNEL_DIED = Reason(
    "KernelDied", "Read the last lines of its output above; often a package such as ipykernel is missing there."
)
OUT_OF_MEMORY = Reason("OutOfMemory", "Give the kernel more memory, or let it use less.")
COMMAND_NOT_FOUND = Reason(
    "CommandNotFound", "Install the program that the kernelspec's argv names on the far side, or correct argv[0]."
)
LAUNCH_TIMEOUT = Reason(
    "LaunchTimeout", "Look at the kernel's log (jupyter gp logs); raise launch_timeout if the start is only slow."
)
CALLBACK_UNREACHABLE = Reason(
    "CallbackUnreachable",
    "No launcher called back: check that the response address can be reached from the far side "
    "(jupyter gp doctor shows it); set GP_RESPONSE_IP if another address must be advertised.",
)
KERNEL_UNREACHABLE = Reason(
    "KernelUnreachable",
    'Remove "channels": "direct" from the config of the kernelspec, and its launcher carries the channels; or open the '
    "kernel's ports (port_range) to this machine.",
)
LAUNCHER_DIED = Reason("LauncherDied", "The launcher ended before its kernel listened: read the log of the job.")
PLATFORM_FAILED = Reason("PlatformFailed", "The platform ended the job: its own message above says why.")
AUTHENTICATION_FAILED = Reason("AuthenticationFailed", "Check the credentials that the backend uses on its platform.")
NO_PORT = Reason("NoPort", "No free port in port_range on the far side: widen the range or stop other kernels.")
NO_SPACE = Reason("NoSpace", "The far side's runtime folder is full or read-only: free space or set GP_RUNTIME_DIR.")
NO_CONNECTION_FILE = Reason(
    "NoConnectionFile", "The launcher cannot use its runtime folder over there: choose another one by GP_RUNTIME_DIR."
)
TLS_UNSUPPORTED = Reason(
    "TlsUnsupported", "The far side's Python has no TLS 1.3: use a Python built with OpenSSL 1.1.1 or newer."
)
ENDPOINT_TAKEN = Reason(
    "EndpointTaken", "Another program has that port or path of this machine: end it, or let gp choose (port 0)."
)
TOO_MANY_FILES = Reason(
    "TooManyFiles", "This server has too many open files: raise its limit (ulimit -n), or end kernels and clients."
)
LAUNCHER_TOO_OLD = Reason(
    "LauncherTooOld", 'Update gp-launchers over there, or put "channels": "direct" into the config of the kernelspec.'
)
DENIED = Reason("Denied", "Ask the operator of this server; authorized_users and limits are policy.")
REFUSED_BY_HOOK = Reason("RefusedByPlugin", "A plugin refused this launch; its message above says why.")
CANCELLED = Reason("Cancelled", "The start was cancelled before the kernel listened; nothing was left running.")
OWNED = Reason(
    "OwnedByAnotherServer",
    "Use the kernel through that process, or end the process: a kernel whose server is gone can be taken over.",
)
CALLBACK_PORT_TAKEN = Reason(
    "CallbackPortTaken",
    "Free that port and start the kernel with the same id again: it waits as long as jupyter gp ps says; or end it by "
    "jupyter gp stop.",
)
SERVER_KEY_CHANGED = Reason(
    "ServerKeyChanged",
    "Put the former server.pem back into the data folder, or end the kernel by jupyter gp stop: its launcher trusts no "
    "other key.",
)
LAUNCHER_NOT_BACK = Reason(
    "LauncherNotBack",
    "The kernel is left as it is: try again, check that the far side can reach the address, or end the kernel by "
    "jupyter gp stop.",
)

REASONS: tuple[Reason, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Reason))
"""The reasons that the core itself gives; the troubleshooting guide has one entry for each."""


class GPError(Exception):
    """Base of every error that gp raises on purpose; its text is meant for the user."""

    http_status: ClassVar[int] = 500


class ConfigError(GPError):
    """An option, kernelspec or parameter has a value that cannot work."""

    http_status = 400


class PluginError(GPError):
    """A plugin is broken, missing or in conflict with another one."""


class ProtocolError(GPError):
    """The other end of a launcher session broke the protocol."""


class StoreError(GPError):
    """The record of a kernel cannot be written or read."""


class BackendError(GPError):
    """The platform behind a backend did not answer or answered with an error; says nothing about the kernel."""

    http_status = 503


class LaunchDenied(GPError):
    """Policy forbids this launch."""

    http_status = 403
    failure = DENIED


class LaunchFailed(GPError):
    """A kernel was asked for and did not come to listen.

    Args:
        message: What happened, to which kernel.
        reason: Typed reason; its advice is appended to the text.
        exit_code: The kernel's exit code, negative for a signal, if it is known.
        log: Last lines of the kernel's or the job's output.
    """

    http_status = 503

    def __init__(
        self, message: str, *, reason: Reason = PLATFORM_FAILED, exit_code: int | None = None, log: str = ""
    ) -> None:
        self.failure = reason
        self.exit_code = exit_code
        self.log = log.strip()
        parts = [f"{message} [{reason.code}]"]
        if self.log:
            parts.append(self.log)
        parts.append(reason.advice)
        super().__init__("\n".join(parts))


class LaunchTimeout(LaunchFailed):
    """A kernel stayed silent until its launch timeout."""

    http_status = 504


@functools.cache
def _readable_class(cls: type[GPError]) -> type[GPError]:
    # tornado.web only when an error really crosses the boundary: importing it costs every short-lived client
    from tornado.web import HTTPError

    body = {"__str__": lambda self: self.text, "__repr__": lambda self: f"{cls.__name__}({self.text!r})"}
    return type(cls.__name__, (cls, HTTPError), body | {"__module__": cls.__module__})


def readable(error: GPError) -> GPError:
    """Return an equal error that every Jupyter server shows to the user.

    Jupyter Server, Kernel Gateway and the gateway client hide the text of ordinary exceptions behind
    "Unhandled error"; only that of a ``tornado.web.HTTPError`` reaches the user in all of them.

    Args:
        error: An error about to leave a provisioner method.

    Returns:
        An error of the same class that is an ``HTTPError`` too, with the code of its typed reason as HTTP reason.
    """
    from tornado.web import HTTPError

    if isinstance(error, HTTPError):
        return error
    text = str(error).replace("%", " percent")  # HTTPError and the gateway client %-format what they are given
    failure = getattr(error, "failure", None)
    code = failure.code if failure else None
    cls: Any = _readable_class(type(error))  # type: ignore[arg-type]  # a class is hashable
    made: Any = cls.__new__(cls)
    HTTPError.__init__(made, error.http_status, text, reason=code)
    made.__dict__ |= {**error.__dict__, "text": text}
    made.__cause__, made.__suppress_context__ = error.__cause__, True
    return cast(GPError, made)
