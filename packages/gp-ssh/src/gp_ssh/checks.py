"""What ``jupyter gp doctor`` checks of a host: the way there, what is there, and both ways back."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from itertools import pairwise

from gp_core import BackendError, ConfigError, Finding
from gp_core.server import KernelServer
from gp_launchers.options import addresses

from .connection import ConnectionFailed
from .host import RemoteHost

CHECK = "doctor"  # stands for a kernel's id where a launcher would call through ssh


async def checked_host(name: str, way: Awaitable[RemoteHost], callback: str, server: KernelServer | None) -> Finding:
    """Visit a host.

    Args:
        name: As the operator writes it.
        way: To the host.
        callback: Option of the backend.
        server: Listens for the time of the check; None: it cannot, which is a finding of its own.
    """
    subject = f"ssh host {name}"
    times: list[tuple[str, float]] = [("", time.monotonic())]

    def done(what: str) -> None:
        times.append((what, time.monotonic()))

    try:
        host = await way
        done("resolved")
        await host.line.connection()
        done("connected")
        facts = await host.look()
        done("answered")
        problem, ways = await _ways_back(host, callback, server)
        done("called back")
    except ConnectionFailed as error:
        return Finding(ok=False, subject=subject, text=error.text, advice=error.reason.advice)
    except (BackendError, ConfigError) as error:
        return Finding(ok=False, subject=subject, text=str(error), advice="read what the host said")
    version, skew = ".".join(map(str, facts.version)), facts.clock - time.time()
    took = ", ".join(f"{what} {then - before:.2f} s" for (_, before), (what, then) in pairwise(times))
    text = f"Python {version} at {facts.python}, {facts.free // 2**20} MiB free, clock {skew:+.1f} s; {ways}; {took}"
    return Finding(ok=not problem, subject=subject, text=text, advice=problem)


async def _ways_back(host: RemoteHost, callback: str, server: KernelServer | None) -> tuple[str, str]:
    """Return what is wrong with the ways back, if that is so, and what each of them is like."""
    if server is None:
        return "", "ways back not tried"
    told = server.addresses(local=False)
    dial = await host.reaches(addresses(",".join(told)))
    dialled = f"{'dials' if dial else 'cannot dial'} {', '.join(told)}"
    through, refused = "calls through ssh", ""
    try:
        await host.forward(server.listener, CHECK)
    except BackendError as error:
        through, refused = "cannot call through ssh", str(error)
    finally:
        host.release(CHECK)
    if {"dial": dial, "ssh": not refused, "auto": dial or not refused}[callback]:
        return "", f"{dialled}, {through}"
    dialling = "open the port in the firewall, or set GP_RESPONSE_IP to an address that the host reaches"
    allowing = "allow TCP forwarding in the host's sshd_config (AllowTcpForwarding)"
    advice = {
        "dial": f"{dialling}, or use callback: ssh",
        "ssh": f"{allowing}, or use callback: dial; it said: {refused}",
        "auto": f"{dialling}, or {allowing}",
    }
    return advice[callback], f"{dialled}, {through}"
