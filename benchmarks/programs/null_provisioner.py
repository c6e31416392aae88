"""A provisioner that does nothing: what a start costs in jupyter_client itself."""

from __future__ import annotations

from typing import Any

from jupyter_client.provisioning import KernelProvisionerBase


class NullProvisioner(KernelProvisionerBase):
    """Its kernels are ready before they exist."""

    has_process = True
    ended = False

    async def poll(self) -> int | None:
        return 0 if self.ended else None

    async def wait(self) -> int | None:
        return 0

    async def send_signal(self, signum: int) -> None:
        pass

    async def kill(self, restart: bool = False) -> None:
        self.ended = True

    async def terminate(self, restart: bool = False) -> None:
        self.ended = True

    async def cleanup(self, restart: bool = False) -> None:
        pass

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        return await super().pre_launch(cmd=list(self.kernel_spec.argv), **kwargs)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> dict[str, Any]:
        names = ("shell_port", "iopub_port", "stdin_port", "hb_port", "control_port")
        self.connection_info = {
            **dict.fromkeys(names, 9),  # nobody is there
            "ip": "127.0.0.1",
            "transport": "tcp",
            "key": self.parent.session.key,
            "signature_scheme": self.parent.session.signature_scheme,
        }
        return self.connection_info
