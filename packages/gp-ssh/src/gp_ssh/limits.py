"""Limits of a kernel by the tools that hosts have; each of them becomes the kernel, so that signals reach it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gp_core import ConfigError
from gp_core.parameters import quantity

PROCESSORS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
# A scope counts what is in memory, of all processes of the kernel; ulimit what one process reserves.
MEMORY = """\
b=$1; shift
if systemd-run --user --scope --quiet -- true 2>/dev/null; then
  exec systemd-run --user --scope --quiet --collect -p "MemoryMax=$b" -p MemorySwapMax=0 -- "$@"
fi
ulimit -v $((b / 1024)) && exec "$@"
"""


def limited(argv: Sequence[str], *, nice: int = 0, cpu_affinity: str = "", memory_limit: str = "") -> list[str]:
    """Return a command that runs another one within limits.

    Args:
        argv: The other one.
        nice: 0 to 19, how far others come first.
        cpu_affinity: Processors that it may use, such as ``0-3,8``; empty: all.
        memory_limit: Bytes, such as ``4Gi``; empty: no limit.

    Raises:
        ConfigError: A value cannot be.
    """
    command = list(argv)
    if memory_limit:
        command = ["/bin/sh", "-c", MEMORY, "sh", str(_bytes(memory_limit)), *command]
    if cpu_affinity:
        if not PROCESSORS.fullmatch(cpu_affinity):
            raise ConfigError(f"cpu_affinity {cpu_affinity!r} is no list of processors: write 0-3 or 0,2,4")
        command = ["taskset", "-c", cpu_affinity, *command]
    return ["nice", "-n", str(nice), *command] if nice else command


def _bytes(text: str) -> int:
    try:
        count = int(quantity(text))
    except ValueError:
        count = 0
    if count < 1024 * 1024:
        raise ConfigError(f"memory_limit {text!r} is not as much memory as a kernel needs: write 4Gi or 500M")
    return count
