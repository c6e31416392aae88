"""What kernels in containers and in a Swarm have in common: an engine, and how a start begins."""

from __future__ import annotations

import contextlib

from gp_core import Backend, BackendError, Handle, LaunchRequest, State, blocking
from gp_core.runtime import runtime
from gp_core.server import kernel_server

from .container import check_image
from .engine import Engine, engine
from .images import checked_reference
from .options import ContainerOptions
from .reasons import launching
from .scripts import for_script

LOOKS = 600.0  # seconds that no look into an image takes


class OnEngine(ContainerOptions, Backend):
    """Base of the backends."""

    async def launch(self, request: LaunchRequest) -> Handle:
        with launching(request.kernel_id):
            where = await engine(self.engine)
            if request.submit == "script":
                return await super().launch(for_script(self, request, url=where.where.url))
            if ("swept", self.name) not in where.known:
                where.known["swept", self.name] = True
                runtime().spawn(self._sweep(where), name=f"sweep of {where}")
            name = checked_reference(self.image or self.image_name)
            check_image(self, name, request.kernel_id)
            return await self.launch_image(where, name, request)

    async def launch_image(self, where: Engine, name: str, request: LaunchRequest) -> Handle:
        """Start a kernel's launcher; what fails leaves nothing.

        Args:
            where: The engine.
            name: Of an image that the operator allows.
            request: Of the core.

        Raises:
            LaunchFailed: The engine refused, with a typed reason.
        """
        raise NotImplementedError

    async def engine_of(self, handle: Handle) -> Engine:
        """Return the engine of a kernel."""
        return await engine(handle.get("engine", self.engine))

    async def _sweep(self, where: Engine) -> None:
        """Remove what has ended and belongs to no server that runs; once for each engine and process."""
        store = kernel_server(self.config).store
        with contextlib.suppress(BackendError):  # the next server tries again
            for handle in await self.discover():
                served = {record.kernel_id for record in await blocking(store.list) if record.is_owned}
                if handle["kernel_id"] in served or handle.get("keep"):
                    continue
                if (await self.look(handle)).state in (State.GONE, State.PENDING):  # or was never started
                    await self.terminate(handle, force=True)
            await where.remove_stale("gp.look", LOOKS)
