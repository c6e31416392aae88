"""A far network on one machine: a network namespace, joined to ours by a line whose delay, loss and breaks we choose.

Nothing of it can be left behind: the far namespace has no name, and lives as long as the forwarder or something in it;
the near device is the only thing on this side, has this process's id in its name, and goes with the forwarder, which
ends with the thread that started it.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from clusters.availability import Unavailable
from clusters.wan.forwarder import open_tap

_FORWARDER = Path(__file__).with_name("forwarder.py")
_NETWORKS = ipaddress.ip_network("198.18.0.0/15")  # for benchmarks of networks: nobody else has them (RFC 2544)
_FAR_DEVICE = "far0"
_counter = itertools.count()
_places = itertools.count(os.getpid())


class Link:
    """The line, and the far network behind it.

    Args:
        seed: Decides which frames are lost.
    """

    def __init__(self, seed: int = 0) -> None:
        self.near = self.far = ""  #: addresses of its two ends
        self._seed = seed
        self._device = f"gp{os.getpid()}l{next(_counter)}"
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._moves = 0

    @staticmethod
    def check_available() -> None:
        """Raise `Unavailable` where no such line can be made."""
        if os.geteuid() != 0:
            raise Unavailable("needs: root, for network namespaces and TAP devices")
        for tool, package in (
            ("ip", "iproute2"),
            *((name, "util-linux") for name in ("unshare", "nsenter", "setpriv")),
        ):
            if shutil.which(tool) is None:
                raise Unavailable(f"needs: apt-get install {package} ({tool} is missing)")
        try:
            os.close(open_tap(f"gp{os.getpid()}probe"))
        except OSError as error:
            raise Unavailable(f"needs: TAP devices (/dev/net/tun: {error.strerror})") from None
        probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
        if probe.returncode:
            raise Unavailable(f"needs: the right to make network namespaces: {probe.stderr.strip()}")

    def up(self) -> None:
        """Make it; raises `Unavailable` where that is impossible."""
        self.check_available()
        near = open_tap(self._device)
        try:
            self._process = subprocess.Popen(
                # the forwarder replaces both tools, so its pid is the one that is known here
                [
                    *("setpriv", "--pdeathsig", "KILL", "unshare", "--net"),
                    *(sys.executable, "-I", "-S", str(_FORWARDER), str(near), _FAR_DEVICE, str(self._seed)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=[near],
                start_new_session=True,
            )
        finally:
            os.close(near)
        try:
            self._heard()
            network = free_network()
            self.near, self.far = f"{network[1]}", f"{network[2]}"
            _run("ip", "address", "add", f"{self.near}/24", "dev", self._device)
            _run("ip", "link", "set", self._device, "up")
            self._run_there("ip", "address", "add", f"{self.far}/24", "dev", _FAR_DEVICE)
            for device in ("lo", _FAR_DEVICE):
                self._run_there("ip", "link", "set", device, "up")
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Remove it; what still runs on the far side is cut off."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()

    # -- the line; may be called from any thread

    def shape(self, *, delay: float = 0.0, loss: float = 0.0, rate: float = 0.0) -> None:
        """Say how it is.

        Args:
            delay: Seconds that a round trip takes longer.
            loss: Share of the frames that get lost.
            rate: Bytes a second, each way; 0: no limit.
        """
        self._tell(delay=delay, loss=loss, rate=rate)

    def blackout(self, now: bool) -> None:
        """Lose everything, or nothing more than before."""
        self._tell(blackout=now)

    def reset(self) -> None:
        """Break all TCP connections: the next segment of each, and all later ones, are answered with RST both ways."""
        self._tell(reset=True)

    def counters(self) -> dict[str, int]:
        """How many frames were ``carried`` and ``lost``."""
        return self._tell()

    def move_far_end(self) -> str:
        """Give the far side another address in the place of its own, and return it."""
        self._moves += 1
        old, self.far = self.far, str(ipaddress.ip_address(self.far) + 1)
        self._run_there("ip", "address", "del", f"{old}/24", "dev", _FAR_DEVICE)
        self._run_there("ip", "address", "add", f"{self.far}/24", "dev", _FAR_DEVICE)
        return self.far

    # -- the far side

    def there(self, *argv: str) -> list[str]:
        """Return the command that runs another one on the far side, in the process that it is started as."""
        return ["nsenter", f"--net={self.namespace}", *argv]

    @property
    def namespace(self) -> str:
        """Path of the far network namespace."""
        assert self._process is not None
        return f"/proc/{self._process.pid}/ns/net"

    # -- parts

    def _run_there(self, *argv: str) -> None:
        _run(*self.there(*argv))

    def _tell(self, **what: Any) -> dict[str, Any]:
        with self._lock:
            assert self._process is not None
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
            return self._heard()

    def _heard(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the forwarder has ended with {self._process.wait()}")
        heard: dict[str, Any] = json.loads(line)
        return heard


def free_network() -> ipaddress.IPv4Network:
    """Return a network that no device of this side has, another one at each call; runs begin at different places."""
    told = subprocess.run(["ip", "-json", "-4", "address"], check=True, capture_output=True, text=True).stdout
    used = {ipaddress.ip_address(one["local"]) for device in json.loads(told) for one in device["addr_info"]}
    networks = list(_NETWORKS.subnets(new_prefix=24))
    start = next(_places) % len(networks)
    for network in networks[start:] + networks[:start]:
        if not any(address in network for address in used):
            assert isinstance(network, ipaddress.IPv4Network)
            return network
    raise Unavailable(f"needs: a free network of {_NETWORKS}")


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
