"""The one provisioner: what jupyter_client asks for on one side, a backend on the other.

Every method hands its work to the runtime's loop and awaits it from whatever loop it is called on. jupyter_client calls
them in these orders (8.x):

- start: ``pre_launch``, ``launch_kernel``, ``post_launch``; with the id of a kernel whose server is gone it takes that
  kernel over
- restart: ``send_signal(SIGINT)``, ``shutdown_requested(restart=True)``, ``poll``, ``wait``,
  ``cleanup(restart=True)``, start
- restart now, autorestart: ``kill(restart=False)``, ``wait``, ``cleanup(restart=True)``, start
- shutdown: as restart, or ``kill``; then ``cleanup(restart=False)``

So ``kill`` and ``terminate`` end the kernel's process only; ``cleanup`` alone decides about launcher and job.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, TypeVar, cast

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase, KernelProvisionerMeta

from . import takeover
from .backend import Backend
from .errors import GPError, readable
from .kernel import RemoteKernel
from .options import ProvisionerOptions
from .planning import CURVE, Planned, Planner, text
from .plugins import plugins
from .protocol import PORTS
from .runtime import runtime
from .server import KernelServer, kernel_server
from .starting import Plan
from .store import Record

T = TypeVar("T")
P = ParamSpec("P")


def boundary(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Make the errors of a method readable in every Jupyter server, and keep the manager's state honest."""

    @functools.wraps(method)
    async def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(*args, **kwargs)
        except GPError as error:
            shown = readable(error)
            parent: Any = getattr(args[0], "parent", None)
            if hasattr(parent, "execution_state"):  # use_pending_kernels has answered 201 already
                parent.execution_state, parent.reason = "dead", str(shown)
            raise shown from error.__cause__

    return guarded


class RemoteProvisioner(KernelProvisionerBase, ProvisionerOptions, metaclass=KernelProvisionerMeta):  # type: ignore[metaclass]
    """Starts kernels through the backend that ``backend_name`` names; subclasses have nothing else."""

    backend_name: ClassVar[str]

    def __init__(self, **kwargs: Any) -> None:
        own = {name: kwargs.pop(name) for name in ("kernel_id", "kernel_spec", "parent", "config") if name in kwargs}
        super().__init__(**own)
        self.connection_info = {}  # upstream's default is one dict shared by the whole class
        self._options = kwargs  # config of kernel.json: checked in pre_launch, where an error reaches the user
        self._kernel: RemoteKernel | None = None
        self._reaped = True
        self._planned: Planned | None = None
        self._former: Record | None = None  # of the kernel to take over
        self._env: dict[str, str] = {}
        self._end_wanted = False
        self._asked_at = self._cleaned_at = 0.0

    # -- what jupyter_client asks for

    @property
    def has_process(self) -> bool:
        return self._kernel is not None and not self._reaped

    async def poll(self) -> int | None:
        """Return None while the kernel lives, else its exit code; called all the time, so from cached state."""
        return self._kernel.exit_code if self._kernel is not None else 0

    async def wait(self) -> int | None:
        code = await runtime().call(self._kernel.wait()) if self._kernel is not None else 0
        self._reaped = True
        return code

    @boundary
    async def send_signal(self, signum: int) -> None:
        if self._kernel is not None:
            await runtime().call(self._kernel.signal(signum))

    @boundary
    async def kill(self, restart: bool = False) -> None:
        self._note_request()
        await self.send_signal(signal.SIGKILL)

    @boundary
    async def terminate(self, restart: bool = False) -> None:
        self._note_request()
        await self.send_signal(signal.SIGTERM)

    @boundary
    async def cleanup(self, restart: bool = False) -> None:
        if self._kernel is not None and not restart:
            kernel, self._kernel, self._reaped = self._kernel, None, True
            await asyncio.shield(runtime().call(kernel.dismiss()))
        self._cleaned_at = time.monotonic()

    async def shutdown_requested(self, restart: bool = False) -> None:
        self._asked_at = time.monotonic()
        self._note_request()
        if self._kernel is not None:
            runtime().loop.call_soon_threadsafe(self._kernel.end_requested)

    def _note_request(self) -> None:
        """Remember that the kernel's end is wanted: otherwise what follows is an autorestart."""
        self._end_wanted = self._end_wanted or (self._kernel is not None and self._kernel.exit_code is None)

    def get_shutdown_wait_time(self, recommended: float = 5.0) -> float:
        chosen = self.shutdown_timeout if self.shutdown_timeout is not None else recommended
        return plugins().timeout(self._kernel.info, "shutdown", chosen) if self._kernel is not None else chosen

    def get_stable_start_time(self, recommended: float = 10.0) -> float:
        return recommended  # launch_kernel returns when the kernel listens: no allowance for a slow platform is needed

    @boundary
    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        # not the base's: it fills the kernelspec's ${X} with this server's environment, which must not travel
        requested = kwargs.pop("env", None)
        extra = kwargs.pop("extra_arguments", None) or []
        kwargs.pop("transport_encryption", None)
        server = kernel_server(self.config)
        # before the listener is opened, which forgets kernels that have ended: their ports and keys serve once more
        former = await runtime().call(takeover.find(server, self.kernel_id)) if self._kernel is None else None
        async with _own_turn():
            planner = await self._planner(server)
            planned = planner.plan(requested, extra, kwargs, self.connection_info)
        if former is not None:
            try:
                takeover.check(server, former, planned.plan.request, encrypted=planner.encryption_required)
            except GPError:
                if not await runtime().call(takeover.has_ended(server, former)):
                    raise
                former = None
        if former is not None:
            planned = planner.plan(requested, extra, kwargs, former.connection)  # in case it has ended: same endpoints
        self._planned, self._former = planned, former
        self.connection_info = _for_manager(former.endpoints if former else planned.plan.connection)
        self._tell_manager()
        self._env = dict(requested if requested is not None else os.environ)
        return {**kwargs, "cmd": list(self._planned.plan.request.argv), "env": dict(self._env)}

    @boundary
    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        assert self._planned is not None
        # Kernel Gateway adds variables of its own between pre_launch and here
        late = {name: value for name, value in kwargs.get("env", {}).items() if self._env.get(name) != value}
        plan = self._planned.plan.with_environment(late)
        kernel, again = self._kernel, self._kernel is not None
        mourned, self._end_wanted = again and not self._end_wanted, False
        await self._let_the_request_expire()
        if kernel is None and await self._took_over(plan):
            return self.connection_info
        if kernel is None:
            kernel = await runtime().call(self._new_kernel(self._planned))
        try:
            await runtime().call(kernel.restart(plan) if again else kernel.launch(plan))
        except asyncio.CancelledError:
            kernel.leaving = True  # at once: the next start of that id waits for its end
            runtime().submit(kernel.abandon())
            raise
        except GPError as error:
            if not mourned:
                raise
            # an error here would stop upstream's restarter for good, with the kernel "restarting" for ever; a kernel
            # that is dead again is what it counts, and after five of them it tells everybody
            self.log.error("kernel %s died and could not be started again: %s", self.kernel_id, error)
        self._kernel = kernel
        self._reaped = False
        self.connection_info = _for_manager(kernel.connection)
        return self.connection_info

    async def get_provisioner_info(self) -> dict[str, Any]:
        """Return what another process needs; JSON-able, its secrets sealed with the server's key."""
        info = dict(self.connection_info)
        hidden = {name: text(info.pop(name)) for name in SECRET if name in info}
        server = kernel_server(self.config)
        sealed = server.identity.seal(json.dumps(hidden).encode()) if server.identity else None
        return {"kernel_id": self.kernel_id, "connection_info": info, "sealed": sealed, "backend": self.backend_name}

    async def load_provisioner_info(self, provisioner_info: dict[str, Any]) -> None:
        """Inverse of `get_provisioner_info`.

        Raises:
            StoreError: It was sealed with another server's key.
        """
        self.kernel_id = provisioner_info["kernel_id"]
        info = dict(provisioner_info["connection_info"])
        server = kernel_server(self.config)
        await runtime().call(server.open())
        if sealed := provisioner_info.get("sealed"):
            assert server.identity is not None
            info |= json.loads(server.identity.unseal(sealed))
        self.connection_info = _for_manager(info)

    def resolve_path(self, path_str: str) -> str | None:
        """Resolve a path of the kernel's, if it runs on this machine."""
        if self._planned is None or not self._backend.runs_here:
            return None
        path = Path(self._planned.plan.request.cwd or Path.cwd(), Path(path_str).expanduser())
        return path.as_posix() if path.exists() else None

    # -- parts

    def _tell_manager(self) -> None:
        """Give the manager what clients need that are made between pre_launch and launch_kernel."""
        manager: Any = self.parent
        if self._former is not None and manager is not None:
            for name in PORTS:
                setattr(manager, name, 0)  # else the ones that it has stay
            manager.load_connection_info(self.connection_info)
        info: Mapping[str, Any] = self.connection_info
        for name in CURVE:
            if name in info and hasattr(manager, name):
                setattr(manager, name, text(info[name]).encode())

    async def _took_over(self, plan: Plan) -> bool:
        """Take the running kernel of that id over, if there is one."""
        former, self._former = self._former, None
        if former is None:
            return False
        assert self._planned is not None
        server = kernel_server(self.config)
        user = object()
        try:
            kernel = await runtime().call(takeover.take_over(server, former, self._planned.policy, plan, user))
        except asyncio.CancelledError:
            runtime().submit(server.give_back(former, user))  # it may have come to its end just then
            raise
        with contextlib.suppress(OSError):
            # the former server's: a manager deletes at the end only a file that it has written itself
            os.unlink(getattr(self.parent, "connection_file", ""))
        if kernel is None:
            return False
        self._kernel, self._reaped = kernel, False
        self.connection_info = _for_manager(kernel.connection)
        return True

    async def _let_the_request_expire(self) -> None:
        """Wait until a ``shutdown_request`` that no kernel took is gone.

        jupyter_client sends one at every restart, also to a kernel that is dead or dies of the interrupt before it.
        ZeroMQ keeps it for the 100 ms of the socket's linger, and gives it to a new kernel that is quick there.
        """
        if self._kernel is not None and self._asked_at and self._kernel.ended_at < self._asked_at + 0.05:
            await asyncio.sleep(max(0.0, self._cleaned_at + LINGER - time.monotonic()))
        self._asked_at = 0.0

    @property
    def _backend(self) -> type[Backend]:
        return plugins().backend(self.backend_name)

    async def _planner(self, server: KernelServer) -> Planner:
        manager, config = self.parent, self._options
        older = config.get("launcher_protocol") in (1, "1")
        # options and policy are checked first: a kernelspec that cannot be opens no port
        planner = Planner(server, self.kernel_id, self.kernel_spec, manager, self, config, self._backend)
        if older or not server.is_open:
            await runtime().call(server.open_protocol_1() if older else server.open())
        return planner

    async def _new_kernel(self, planned: Planned) -> RemoteKernel:
        request, server = planned.plan.request, kernel_server(self.config)
        record = Record(
            kernel_id=request.kernel_id,
            kernel_name=request.kernel_name,
            user=request.user,
            backend=self.backend_name,
            options=planned.backend_options,
            orphan_timeout=planned.orphan_timeout,
        )
        backend = self._backend(parent=self.parent, config=self.config, **planned.backend_options)
        kernel = RemoteKernel(server, backend, record)
        await server.admit(kernel, planned.policy)
        return kernel


_turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()


@contextlib.asynccontextmanager
async def _own_turn() -> AsyncIterator[None]:
    """Wait for a turn of the host's loop without another plan in it: fifty in one turn would stop it for a while."""
    async with _turns.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
        await asyncio.sleep(0)
        yield


LINGER = 0.15  # seconds for which an undelivered request can still reach somebody
SECRET = ("key", *CURVE)


def _for_manager(info: Mapping[str, Any]) -> KernelConnectionInfo:
    """Return a connection info in jupyter_client's types: the key as bytes."""
    made = dict(info)
    if isinstance(made.get("key"), str):
        made["key"] = made["key"].encode()
    return cast(KernelConnectionInfo, made)
