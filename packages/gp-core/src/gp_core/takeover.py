"""Take a running kernel over from a server that is gone: ``start_kernel(kernel_id=ID)`` asks for it.

The record says all: ports, keys, handle, and where the launcher calls back to. The lease in it changes hands first, so
of several servers that try one succeeds; then the recorded port is opened; then the launcher calls.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from .backend import KernelInfo
from .errors import (
    LAUNCHER_NOT_BACK,
    SERVER_KEY_CHANGED,
    BackendError,
    ConfigError,
    GPError,
    LaunchDenied,
    LaunchFailed,
)
from .policies import Policy
from .runtime import runtime
from .server import owned
from .store import Record

if TYPE_CHECKING:
    from .kernel import RemoteKernel
    from .server import KernelServer
    from .starting import Plan

LEAVING = 30.0  # seconds that a new start waits for the removal of a former kernel of that id


async def find(server: KernelServer, kernel_id: str) -> Record | None:
    """Return the record of a kernel that was started before; None: there is none, so a start is a new one.

    Args:
        server: Of this process.
        kernel_id: Of the kernel that is asked for.
    """
    known = server.kernels.get(kernel_id)
    if known is not None and known.leaving:  # of a start that failed or was cancelled a moment ago
        await known.forgotten(LEAVING)
        known = server.kernels.get(kernel_id)
    return known.record if known is not None else await runtime().blocking(server.store.get, kernel_id)


def check(server: KernelServer, record: Record, asked: KernelInfo, *, encrypted: bool) -> None:
    """Check that a kernel may be taken over; changes nothing.

    Args:
        server: Of this process; its listener is open.
        record: The kernel's.
        asked: What the start asks for.
        encrypted: Whether its channels must be.

    Raises:
        LaunchDenied: It is another user's.
        ConfigError: It was started from another kernelspec, by another backend, or without CurveZMQ.
        LaunchFailed: It belongs to a server that lives, or its launcher cannot come here.
    """
    kernel = f"kernel {record.kernel_id}"
    if record.user != asked.user:
        raise LaunchDenied(f"{kernel} belongs to user {record.user!r}: user {asked.user!r} may not take it over")
    if _is_used(server, record):
        raise owned(record)
    for name, was, wanted in (
        ("backend", record.backend, asked.backend),
        ("kernelspec", record.kernel_name, asked.kernel_name),
    ):
        if was != wanted:
            raise ConfigError(
                f"{kernel} was started with {name} {was!r} and cannot be taken over as one of {name} {wanted!r}: ask "
                "for the same kernelspec, or end it by jupyter gp stop"
            )
    if encrypted and not record.connection.get("curve_publickey"):
        raise ConfigError(
            f"{kernel} cannot be taken over: transport_encryption is required, and it was started without; end it by "
            "jupyter gp stop"
        )
    if record.launcher_protocol == 1:
        text = f"{kernel} cannot be taken over: its launcher speaks protocol 1, which never calls back again"
        raise LaunchFailed(text, reason=LAUNCHER_NOT_BACK)
    assert server.identity is not None
    if record.pins and server.identity.pins[0] not in record.pins.split(","):
        text = f"{kernel} cannot be taken over: it was started by a server with another key"
        raise LaunchFailed(text, reason=SERVER_KEY_CHANGED)


def _is_used(server: KernelServer, record: Record) -> bool:
    known = server.kernels.get(record.kernel_id)
    if known is not None:
        return known.user is not None  # else this process only keeps it alive
    return record.is_owned and record.owner != server.owner


async def has_ended(server: KernelServer, record: Record) -> bool:
    """Look whether a kernel that may not be taken over is gone, so that its id is free for whoever asks.

    Args:
        server: Of this process; its listener is open.
        record: The kernel's.
    """
    from .kernel import RemoteKernel

    if record.kernel_id in server.kernels or _is_used(server, record):
        return False
    try:
        return await RemoteKernel.of_record(server, record).is_gone()
    except GPError as error:
        server.log.debug("kernel %s may still run: %s", record.kernel_id, error)
        return False


async def take_over(
    server: KernelServer, record: Record, policy: Policy, plan: Plan, user: object
) -> RemoteKernel | None:
    """Take a kernel over that `check` has nothing against.

    Args:
        server: Of this process; its listener is open.
        record: The kernel's.
        policy: Says how many kernels its user may have.
        plan: Says how long to wait for its launcher, and what proves that the kernel is there.
        user: Stands for the manager that asks; `KernelServer.give_back` wants it.

    Returns:
        The kernel. None if it has ended: what was left of it is removed, and it can be started anew. To a caller of
        ``start_kernel(kernel_id=ID)`` that is no error: jupyter_client starts whatever does not run.

    Raises:
        LaunchFailed: Another server was quicker, the recorded port is taken, or the launcher does not call back in
            time. The kernel is left as it is.
        LaunchDenied: The user has as many kernels as allowed.
    """
    kernel = await _taken(server, record, user)
    if kernel is not None:
        if await _is_back(server, kernel, record, policy, plan, user):
            return kernel
        await kernel.remove()
    server.log.warning(
        "kernel %s cannot be taken over, because it has ended: it is started anew, without its variables",
        record.kernel_id,
    )
    return None


async def _is_back(
    server: KernelServer, kernel: RemoteKernel, record: Record, policy: Policy, plan: Plan, user: object
) -> bool:
    try:
        await server.admit(kernel, policy)
        if kernel.session is None:
            if await kernel.is_gone():
                return False
            await server.listen_at(record.kernel_id, record.bind)
            await _adopt(server, kernel)
        return await kernel.resume(plan)
    except BaseException as error:
        undoing = runtime().spawn(server.give_back(record, user), name="clean-up of a takeover")
        if isinstance(error, Exception):
            await asyncio.shield(undoing)
        raise


async def _adopt(server: KernelServer, kernel: RemoteKernel) -> None:
    assert kernel.record.handle is not None
    try:
        await kernel.backend.adopt(kernel.record.handle, server.listener)
    except BackendError as error:  # whether the launcher comes all the same shows at once
        server.log.warning("kernel %s: %s", kernel.info.kernel_id, error)


async def _taken(server: KernelServer, record: Record, user: object) -> RemoteKernel | None:
    """Take the lease; it does not stay here if the caller is cancelled meanwhile."""
    taking = asyncio.ensure_future(server.take(record, user))
    try:
        return await asyncio.shield(taking)
    except asyncio.CancelledError:
        runtime().spawn(_undo(server, taking, record, user), name="clean-up of a takeover")
        raise


async def _undo(server: KernelServer, taking: asyncio.Future[Any], former: Record, user: object) -> None:
    await asyncio.wait({taking})
    if not taking.cancelled() and taking.exception() is None:
        await server.give_back(former, user)
