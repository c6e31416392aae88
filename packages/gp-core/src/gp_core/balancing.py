"""Which host gets the next kernel: pure algorithms, and a ledger of what runs and what failed where.

What an algorithm must remember of a host the `Ledger` writes into its `Host`: how many kernels it has, and
when it had its last turn. So every algorithm, also round-robin or a plugin's, needs its arguments only.

The ledger is per process. Round-robin starts at any host and least-connection takes any of equals, because
on many hubs every user has a server of their own, and all of them would otherwise begin with the same host.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ._markers import hookimpl
from .backend import KernelInfo
from .errors import ConfigError

ALGORITHMS = ("round-robin", "least-connection", "random", "weighted", "sticky", "least-load")
SHARE = 0.1  # of a host, which a kernel counts as for "least-load": its own load shows only later


@dataclass(frozen=True)
class Host:
    """A host that could run a kernel.

    Args:
        name: Unique among the hosts of a kernelspec.
        weight: Relative share for "weighted" and "sticky"; 0: only if no host has more.
        kernels: Kernels that run there now; `Ledger.usable` adds those that it knows of.
        turn: When it was chosen last: lower is longer ago, below 0 is never; `Ledger.usable` fills it in.
        load: How busy it is: 0 idle, 1 and more busy, infinite unknown; the backend fills it in if `wants_load`.
    """

    name: str
    weight: float = 1
    kernels: int = 0
    turn: int = 0
    load: float = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigError(f"weight {self.weight} of host {self.name} must be a number and not negative")


def round_robin(hosts: Sequence[Host]) -> str:
    """Return the host whose turn is longest ago, which goes round evenly also while hosts come and go."""
    return min(hosts, key=lambda host: host.turn).name


def least_connection(hosts: Sequence[Host], point: float) -> str:
    """Return one of the hosts with the fewest kernels, by a random number ``point`` in [0, 1)."""
    fewest = min(host.kernels for host in hosts)
    return uniform([host for host in hosts if host.kernels == fewest], point)


def uniform(hosts: Sequence[Host], point: float) -> str:
    """Return any host with equal chance, by a random number ``point`` in [0, 1)."""
    return hosts[int(point * len(hosts))].name


def weighted(hosts: Sequence[Host], point: float) -> str:
    """Return a host with a chance in proportion to its weight, by a random number ``point`` in [0, 1)."""
    able = [host for host in hosts if host.weight > 0]
    if not able:
        return uniform(hosts, point)
    left = point * math.fsum(host.weight for host in able)
    for host in able:
        left -= host.weight
        if left < 0:
            return host.name
    return able[-1].name  # rounding


def sticky(hosts: Sequence[Host], user: str) -> str:
    """Return the same host for the same user as long as it is among ``hosts``.

    Weighted rendezvous hashing: it needs no memory, all servers agree, and a host that comes or goes moves
    only the users that it wins or loses.
    """

    def score(host: Host) -> tuple[float, str]:
        key = f"{user}\0{host.name}".encode("utf-8", "surrogatepass")
        bits = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 12
        return host.weight / -math.log((bits + 0.5) / 2**52), host.name

    return max(hosts, key=score).name


def least_load(hosts: Sequence[Host]) -> str:
    """Return the host that is least busy for its weight, counting kernels that were started there just now."""

    def busy(host: Host) -> tuple[float, int]:
        each = host.weight or 1e-9
        return (host.load + SHARE * host.kernels) / each, host.turn

    return min(hosts, key=busy).name


def wants_load(algorithm: str) -> bool:
    """Whether an algorithm looks at `Host.load`, which takes time to find out; a plugin's may."""
    return algorithm == "least-load" or algorithm not in ALGORITHMS


def wants_kernels(algorithm: str) -> bool:
    """Whether an algorithm looks at `Host.kernels`; those that this process knows of nobody has to ask for."""
    return algorithm == "least-connection" or wants_load(algorithm)


@hookimpl(trylast=True)
def gp_select_host(algorithm: str, hosts: Sequence[Host], kernel: KernelInfo) -> str:
    """Choose by one of `ALGORITHMS`.

    Raises:
        ConfigError: It is none of these, and no plugin had an answer either.
    """
    if algorithm == "round-robin":
        return round_robin(hosts)
    if algorithm == "least-connection":
        return least_connection(hosts, random.random())
    if algorithm == "random":
        return uniform(hosts, random.random())
    if algorithm == "weighted":
        return weighted(hosts, random.random())
    if algorithm == "sticky":
        return sticky(hosts, kernel.user)
    if algorithm == "least-load":
        return least_load(hosts)
    raise ConfigError(f"load balancing algorithm {algorithm!r} is none of {', '.join(ALGORITHMS)}")


@dataclass
class _Failure:
    at: float
    backoff: float

    def holds(self, now: float) -> bool:
        return now < self.at + self.backoff


class Ledger:
    """What this process knows of hosts: kernels, turns and recent failures. For use on one event loop.

    Args:
        backoff: Seconds that a host is left out after its first failure.
        longest: Seconds that it is left out at most; the time doubles with each failure in a row.
        start: Position at which round-robin begins; default: anywhere.
    """

    def __init__(self, *, backoff: float = 10, longest: float = 300, start: int | None = None) -> None:
        self._backoff, self._longest = backoff, longest
        self._start = random.randrange(2**16) if start is None else start
        self._hosts: dict[str, str] = {}  # by kernel id
        self._failures: dict[str, _Failure] = {}
        self._turns: dict[str, int] = {}
        self._turn = 0

    def usable(self, hosts: Sequence[Host], now: float) -> list[Host]:
        """Leave out hosts that failed recently; if all did, return the one whose failure is longest ago.

        Args:
            hosts: All hosts, with the kernels that this ledger does not know of.
            now: Seconds of a clock that never goes back.

        Returns:
            Hosts with all their kernels and their last turns.
        """
        booked = Counter(self._hosts.values())
        known = []
        for position, host in enumerate(hosts):
            never = (position - self._start) % len(hosts) - len(hosts)
            turn = self._turns.get(host.name, never)
            known.append(replace(host, kernels=host.kernels + booked[host.name], turn=turn))
        good = [host for host in known if not self._left_out(host.name, now)]
        return good or sorted(known, key=lambda host: self._failures[host.name].at)[:1]

    def _left_out(self, host: str, now: float) -> bool:
        failure = self._failures.get(host)
        return failure is not None and failure.holds(now)

    def __contains__(self, kernel_id: str) -> bool:
        return kernel_id in self._hosts

    def started(self, host: str, kernel_id: str) -> None:
        """Book a kernel as soon as its host is chosen, so that starts at the same time see each other."""
        self._hosts[kernel_id] = host
        self._turn += 1
        self._turns[host] = self._turn

    def ended(self, kernel_id: str) -> None:
        """Forget a kernel that ended or did not start; harmless for an unknown one."""
        self._hosts.pop(kernel_id, None)

    def failed(self, host: str, now: float) -> None:
        """Note that a host could not start a kernel for a reason of its own.

        Failures while it is left out already count as one: many starts at the same time fail together.
        """
        last = self._failures.get(host)
        backoff = last.backoff if last else self._backoff
        if last and not last.holds(now):
            backoff = min(backoff * 2, self._longest)
        self._failures[host] = _Failure(now, backoff)

    def ok(self, host: str) -> None:
        """Note that a host started a kernel: its failures are forgotten."""
        self._failures.pop(host, None)


def select(
    algorithm: str,
    hosts: Sequence[Host],
    kernel: KernelInfo,
    ledger: Ledger,
    *,
    now: float,
    ask: Callable[[str, Sequence[Host], KernelInfo], str] = gp_select_host,
) -> str:
    """Choose the host for a kernel among those that are usable, and book it there.

    Args:
        algorithm: One of `ALGORITHMS`, or one that a plugin offers.
        hosts: All hosts of the kernelspec.
        kernel: To be placed.
        ledger: Of this process.
        now: Seconds of a clock that never goes back.
        ask: Asks the plugins, such as `Plugins.select_host`; default: only the algorithms here.

    Returns:
        Name of the host; the caller tells the ledger how the start went, and of the kernel's end.

    Raises:
        ConfigError: There is no host, or nobody knows the algorithm.
    """
    if not hosts:
        raise ConfigError(f"kernel {kernel.kernel_id} has no host to run on")
    name = ask(algorithm, ledger.usable(hosts, now), kernel)
    ledger.started(name, kernel.kernel_id)
    return name
