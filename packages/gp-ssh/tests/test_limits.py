"""Limits of kernels, with this machine's tools."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gp_core import ConfigError
from gp_ssh.limits import limited

TELL = """
import os, resource, sys
limit = resource.getrlimit(resource.RLIMIT_AS)[0]
print(os.getpid(), os.nice(0), sorted(os.sched_getaffinity(0)), limit, sys.argv[1:])
"""


def told(**limits: object) -> tuple[int, list[str]]:
    argv = [sys.executable, "-c", TELL, "a b", "$(id)"]
    # no user's systemd here, whatever this machine has
    env = {**os.environ, "XDG_RUNTIME_DIR": "/nowhere", "DBUS_SESSION_BUS_ADDRESS": "unix:path=/nowhere"}
    process = subprocess.Popen(limited(argv, **limits), stdout=subprocess.PIPE, text=True, env=env)  # type: ignore[arg-type]
    said = process.communicate(timeout=30)[0].split(maxsplit=1)
    assert int(said[0]) == process.pid, "signals must reach the kernel itself"
    return process.pid, said[1].strip().split(maxsplit=1)


def test_without_limits_the_command_stays_as_it_is() -> None:
    assert limited(["x", "y"]) == ["x", "y"]


def test_limits_hold_and_arguments_are_data() -> None:
    processor = min(os.sched_getaffinity(0))
    _, (nice, rest) = told(nice=5, cpu_affinity=str(processor), memory_limit="4Gi")
    assert int(nice) == os.nice(0) + 5
    assert rest == f"[{processor}] {4 * 2**30} ['a b', '$(id)']"


@pytest.mark.parametrize(
    "wrong",
    [
        {"cpu_affinity": "0; touch x"},
        {"cpu_affinity": "all"},
        {"cpu_affinity": "0\n"},
        {"memory_limit": "lots"},
        {"memory_limit": "12"},
        {"memory_limit": "-4Gi"},
    ],
)
def test_values_that_cannot_be_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        limited(["x"], **wrong)  # type: ignore[arg-type]
