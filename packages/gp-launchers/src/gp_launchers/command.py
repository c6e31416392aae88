"""What the kernel is started with: argv, environment and folder."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Mapping, Sequence

    from .options import Options

_PLACEHOLDERS = ("kernel_id", "port_range", "response_address", "public_key", "transport_encryption")


def kernel_argv(argv: Sequence[str], options: Options, connection_file: str) -> list[str]:
    """Return the argv with its placeholders filled in; unknown ones stay.

    Args:
        argv: The kernel's argv; empty: an ipykernel of this Python.
        options: Gives the values of the placeholders.
        connection_file: Path of the connection file.
    """
    filled = list(argv or (sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"))
    values = {name: options.given.get(name, "") for name in _PLACEHOLDERS}
    values["port_range"] = values["port_range"] or "0..0"
    values["connection_file"] = connection_file
    for name, value in values.items():
        filled = [word.replace(f"{{{name}}}", value) for word in filled]
    return filled


def kernel_environment(environ: Mapping[str, str], additions: Mapping[str, str], kernel_id: str) -> dict[str, str]:
    """Return the kernel's environment.

    Args:
        environ: Environment of the launcher, without the secrets.
        additions: What the server adds; `${X}` in a value is the far side's X, or another addition that is literal, and
            `$$` is a dollar.
        kernel_id: For KERNEL_ID.
    """
    literal = {
        name: value.replace("$$", "$") for name, value in additions.items() if "$" not in value.replace("$$", "")
    }
    values = {**environ, **literal}
    result = dict(values)
    for name, value in additions.items():
        if name not in literal:
            from string import Template  # imports `re`: only for those who need it

            result[name] = Template(value).safe_substitute(values)
    result["KERNEL_ID"] = kernel_id
    # It is a promise to the kernel about its parent (ipykernel ends when that changes), so it is never the server's.
    result["JPY_PARENT_PID"] = str(os.getpid())
    return result


def kernel_folder(cwd: str, environ: Mapping[str, str], log: Callable[..., object]) -> str:
    """Return the folder to start in, empty: where the launcher is."""
    if not cwd or (os.path.isdir(cwd) and os.access(cwd, os.X_OK)):
        return cwd
    home = environ.get("HOME") or "/"
    log("the folder %s does not exist here: the kernel starts in %s", cwd, home)
    return home
