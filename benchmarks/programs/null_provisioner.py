"""A provisioner that does nothing: what a start costs in jupyter_client itself."""

from __future__ import annotations

from typing import Any

from jupyter_client.provisioning import KernelProvisionerBase


class NullProvisioner(KernelProvisionerBase):
    """Its kernels are ready before they exist."""

    has_process = False

    async def poll(self) -> int | None:
        return None

    async def wait(self) -> int | None:
        return 0

    async def send_signal(self, signum: int) -> None:
        pass

    async def kill(self, restart: bool = False) -> None:
        pass

    async def terminate(self, restart: bool = False) -> None:
        pass

    async def cleanup(self, restart: bool = False) -> None:
        pass

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        return await super().pre_launch(cmd=list(self.kernel_spec.argv), **kwargs)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> dict[str, Any]:
        manager = self.parent
        ports = (manager.shell_port, manager.iopub_port, manager.stdin_port, manager.hb_port, manager.control_port)
        names = ("shell_port", "iopub_port", "stdin_port", "hb_port", "control_port")
        self.connection_info = {
            **dict(zip(names, ports, strict=True)),
            "ip": "127.0.0.1",
            "transport": "tcp",
            "key": manager.session.key,
            "signature_scheme": manager.session.signature_scheme,
        }
        return self.connection_info
