"""Kernels in containers, and the proof that nothing of them remains on their engine."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from clusters.docker import IMAGE, Engine
from jupyter_client.manager import KernelManager

from support.driven import Driven, driven
from support.installation import Installation, wait_until

KERNEL = "boxed"
"""Name of the kernelspec."""

Boxed = Callable[..., AbstractContextManager[Driven]]
"""Start an ipykernel in a container: ``start``, ``argv``, ``parameters``, and options of the backend."""


@contextmanager
def boxing(
    installation: Installation, ipykernel_spec: Path, engine: Engine, provisioner: str = "docker-provisioner"
) -> Iterator[Boxed]:
    """Let a test start kernels; at the end the engine has what it had before.

    Args:
        installation: Gets the kernelspec.
        ipykernel_spec: What it is made of.
        engine: Whose containers and the like are counted.
        provisioner: Name of it.
    """
    before = engine.counts()

    def boxed(
        *, start: bool = True, argv: Sequence[str] = (), parameters: Any = None, **config: Any
    ) -> AbstractContextManager[Driven]:
        spec = json.loads((ipykernel_spec / "kernel.json").read_text())
        spec["argv"] = list(argv) or ["python3", *spec["argv"][1:]]
        stanza = {"provisioner_name": provisioner, "config": {"image_name": IMAGE, **config}}
        spec["metadata"] = {"kernel_provisioner": stanza, **({"parameters": parameters} if parameters else {})}
        folder = installation.jupyter.data_dir / "kernels" / KERNEL
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "kernel.json").write_text(json.dumps(spec))
        return driven(KernelManager(kernel_name=KERNEL), start=start)

    yield boxed
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: engine.counts() == before, 30, every=0.1)
    assert engine.counts() == before


def inspected(engine: Engine, used: Driven) -> dict[str, Any]:
    """What the engine tells of a kernel's container."""
    with engine.client() as client:
        (found,) = client.containers(all=True, filters={"label": f"kernel_id={used.manager.kernel_id}"})
        told: dict[str, Any] = client.inspect_container(found["Id"])
    return told
