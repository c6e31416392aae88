"""Containers that are thrown away: they tell which kernels an image has, and what can be reached from inside."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gp_core import BackendError, Environment
from gp_core.runtime import runtime
from gp_launchers import bundle

from .container import BASE
from .engine import Engine
from .options import DockerOptions
from .reasons import Refused

if TYPE_CHECKING:
    from docker import APIClient

LONGEST = 120.0  # seconds for a container to tell
LAUNCHER = f"{BASE}/gp-launcher.pyz"

DIAL = """
import socket, sys
for address in sys.argv[1].split(","):
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), 3).close()
        print("reached", address)
    except OSError as error:
        print("failed", address, error.strerror or error)
"""


async def kernels_of(engine: Engine, image: str, options: DockerOptions) -> list[Environment]:
    """Return the kernels of an image that the engine has.

    Args:
        engine: The engine.
        image: Its name or id.
        options: Of the backend.

    Raises:
        BackendError: A container of it does not tell.
    """
    command = [options.python, "-I", "-S", LAUNCHER, "--survey"]
    code, said = await _told(engine, image, options, command, network="none")
    for line in reversed(said.splitlines()):  # an entrypoint may say something, too
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if isinstance(told, list):
            where = {"engine": options.engine} if options.engine else {}
            config = {"image_name": image, **where}
            return [Environment.read(one, config=config) for one in told]
    raise BackendError(f"image {image} does not tell of its kernels (exit code {code}): {said[-500:].strip()}")


async def reached(engine: Engine, image: str, options: DockerOptions, addresses: Sequence[str]) -> dict[str, str]:
    """Dial addresses from inside a container.

    Args:
        engine: The engine.
        image: Its name or id.
        options: Of the backend; its first network counts.
        addresses: Each ``host:port``.

    Returns:
        What went wrong by address; empty if it was reached.

    Raises:
        BackendError: The container did not tell.
    """
    command = [options.python, "-I", "-S", "-c", DIAL, ",".join(addresses)]
    code, said = await _told(engine, image, options, command, network=options.networks[0] if options.networks else None)
    found = {}
    for line in said.splitlines():
        word, _, rest = line.partition(" ")
        address, _, why = rest.partition(" ")
        if word in ("reached", "failed") and address in addresses:
            found[address] = why if word == "failed" else ""
    if not found:
        raise BackendError(f"image {image} does not run Python (exit code {code}): {said[-500:].strip()}")
    return found


async def _told(
    engine: Engine, image: str, options: DockerOptions, command: list[str], *, network: str | None
) -> tuple[int, str]:
    how = {"entrypoint" if options.entrypoint == "replace" else "command": command}
    work = partial(_run, image=image, how=how, network=network)
    try:
        return await runtime().apart(engine.asked, work, await engine.connected())
    except Refused as error:
        raise BackendError(f"image {image}: {error.said}") from None


def _run(client: APIClient, image: str, how: dict[str, Any], network: str | None) -> tuple[int, str]:
    host_config = client.create_host_config(
        network_mode=network, cap_drop=["ALL"], security_opt=["no-new-privileges"], init=True
    )
    made = client.create_container(image, **how, labels={"gp.look": "yes"}, host_config=host_config)["Id"]
    try:
        client.put_archive(made, "/", _archive())
        client.start(made)
        code = int(client.wait(made, timeout=LONGEST)["StatusCode"])
        return code, bytes(client.logs(made)).decode("utf-8", "replace")
    finally:
        client.remove_container(made, v=True, force=True)


def _archive() -> bytes:
    buffer = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        launcher = Path(bundle.build(Path(folder, "launcher"))).read_bytes()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo(LAUNCHER.strip("/"))
        info.size, info.mode = len(launcher), 0o444
        archive.addfile(info, io.BytesIO(launcher))
    return buffer.getvalue()
