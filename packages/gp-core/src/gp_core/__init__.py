"""Start Jupyter kernels somewhere else, from any program that uses jupyter_client.

What an author of a backend needs is exported here; everything is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._markers import hookimpl
    from .backend import Backend, Finding, Handle, KernelInfo, LaunchRequest, State, Status
    from .balancing import Host
    from .environments import Environment
    from .errors import BackendError, ConfigError, GPError, LaunchDenied, LaunchFailed, PluginError, Reason
    from .events import Event, KernelEvent
    from .provisioner import RemoteProvisioner
    from .runtime import Completed, blocking, run_command
    from .settings import from_env
    from .startup import FAIL, WAIT, Verdict

__version__ = "0.1.0"

_HOMES = {
    "_markers": ("hookimpl",),
    "backend": ("Backend", "Finding", "Handle", "KernelInfo", "LaunchRequest", "State", "Status"),
    "balancing": ("Host",),
    "environments": ("Environment",),
    "errors": ("BackendError", "ConfigError", "GPError", "LaunchDenied", "LaunchFailed", "PluginError", "Reason"),
    "events": ("Event", "KernelEvent"),
    "provisioner": ("RemoteProvisioner",),
    "runtime": ("Completed", "blocking", "run_command"),
    "settings": ("from_env",),
    "startup": ("FAIL", "WAIT", "Verdict"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "FAIL",
    "WAIT",
    "Backend",
    "BackendError",
    "Completed",
    "ConfigError",
    "Environment",
    "Event",
    "Finding",
    "GPError",
    "Handle",
    "Host",
    "KernelEvent",
    "KernelInfo",
    "LaunchDenied",
    "LaunchFailed",
    "LaunchRequest",
    "PluginError",
    "Reason",
    "RemoteProvisioner",
    "State",
    "Status",
    "Verdict",
    "blocking",
    "from_env",
    "hookimpl",
    "run_command",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
