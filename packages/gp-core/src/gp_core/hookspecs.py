"""Every hook, in the order in which a launch meets it.

``firstresult`` hooks are policies: plain functions, cheap and pure; ``None`` means "no opinion".
List hooks that may be ``async def`` say so; the core awaits them on its own event loop.
pluggy never fills in defaults, so no specification has any; an implementation may leave out arguments.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ._markers import hookspec

if TYPE_CHECKING:
    from .backend import Backend, Handle, KernelInfo, LaunchRequest, Status
    from .balancing import Host
    from .events import KernelEvent
    from .install import SpecTemplate
    from .startup import Verdict


@hookspec
def gp_backends() -> Iterable[type[Backend]]:  # type: ignore[empty-body]
    """Offer backends. Asked once; a name that is taken already is an error that names both owners."""


@hookspec
def gp_before_launch(request: LaunchRequest) -> Awaitable[Mapping[str, str] | None] | Mapping[str, str] | None:
    """Look at a launch before it happens; may be async.

    Returns:
        Additions to the kernel's environment, or None.

    Raises:
        LaunchDenied: To refuse the launch, with a text for the user.
    """


@hookspec(firstresult=True)
def gp_select_host(algorithm: str, hosts: Sequence[Host], kernel: KernelInfo) -> str | None:
    """Choose the host for a kernel among those that are usable now; the name of one of ``hosts``."""


@hookspec(firstresult=True)
def gp_timeout(kernel: KernelInfo, phase: str) -> float | None:
    """Seconds allowed for ``phase``: "launch" or "shutdown"."""


@hookspec(firstresult=True)
def gp_confirm_startup(kernel: KernelInfo, status: Status, elapsed: float) -> Verdict | None:
    """Judge one look at a starting kernel: `WAIT`, or `FAIL` with a typed reason; ``elapsed`` in seconds."""


@hookspec
def gp_discover(backend: Backend, kernel_id: str | None) -> Awaitable[Iterable[Handle]] | Iterable[Handle] | None:
    """Find kernels that exist out there, for script launches, ``ps`` and ``gc``; may be async."""


@hookspec
def gp_kernel_event(kernel: KernelInfo, event: KernelEvent) -> Awaitable[None] | None:
    """Hear of a kernel's progress; may be async. An error here is logged and never hurts the kernel."""


@hookspec
def gp_spec_templates() -> Iterable[SpecTemplate]:  # type: ignore[empty-body]
    """Offer kernelspec templates for ``jupyter gp install``."""
