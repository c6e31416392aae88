"""How often the system has ended processes of our control group because its memory was used up."""

from __future__ import annotations

ROOT = "/sys/fs/cgroup"


def oom_kills() -> int:
    """Return the count so far; 0 where the system does not tell."""
    return next((count for count in map(_count, _files()) if count is not None), 0)


def _files() -> list[str]:
    """Where the count may be: of version 2 or 1, at our own path or, in a container, at the root that it sees."""
    files = []
    for line in _read("/proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            files += [f"{ROOT}{path.rstrip('/')}/memory.events", f"{ROOT}/memory.events"]
        elif "memory" in controllers.split(","):
            folder = f"{ROOT}/memory"
            files += [f"{folder}{path.rstrip('/')}/memory.oom_control", f"{folder}/memory.oom_control"]
    return files


def _count(path: str) -> int | None:
    for line in _read(path).splitlines():
        name, _, number = line.partition(" ")
        if name == "oom_kill" and number.isdigit():
            return int(number)
    return None


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
