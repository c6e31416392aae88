"""What ``jupyter gp doctor`` checks of an engine: that it answers, and that containers on it reach this server."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

from gp_core import BackendError, ConfigError, Finding
from gp_core.server import KernelServer
from gp_core.trial import trial_listener

from .engine import Engine
from .options import DockerOptions
from .throwaway import reached

FIRST = Callable[[Engine, int], Awaitable[str]]


async def checked_engine(engine: Engine, options: DockerOptions, server: KernelServer, first: FIRST) -> list[Finding]:
    """Ask an engine, and dial back from a container of the image, if there is one.

    Args:
        engine: The engine.
        options: Of the backend.
        server: Options of the process; nothing of it is open.
        first: Returns the address that launchers try first, for a port.

    Raises:
        EngineUnreachable: It does not answer.
    """
    it = await engine.do(lambda client: client.version())
    text = f"version {it['Version']}, API {it['ApiVersion']}, {it['Os']}/{it['Arch']}"
    findings = [Finding(ok=True, subject=f"docker engine {engine}", text=text)]
    image = options.image or options.image_name
    if not image:
        return findings
    subject = f"containers of {image}"
    with contextlib.suppress(ConfigError), trial_listener(server):  # that nothing can be bound is a finding of its own
        addresses = list(
            dict.fromkeys(filter(None, [await first(engine, server.port), *server.addresses(local=False)]))
        )
        try:
            found = await reached(engine, image, options, addresses)
        except BackendError as error:
            findings.append(
                Finding(ok=False, subject=subject, text=str(error), advice="pull the image, or correct image_name")
            )
            return findings
        ways = ", ".join(f"{one}: {why or 'reached'}" for one, why in found.items())
        good = not all(found.values())
        advice = "" if good else "open the port in the firewall, or set GP_RESPONSE_IP to an address that they reach"
        findings.append(Finding(ok=good, subject=subject, text=f"calls back: {ways}", advice=advice))
    return findings
