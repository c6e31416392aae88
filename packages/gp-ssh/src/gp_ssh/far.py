"""Answers questions about a host: runs over there for the time of one question, and leaves nothing but its folder.

`gp_ssh.host` sends this text to a Python >= 3.8 of the host; it needs the standard library only. What it keeps is in
``~/.cache/gp``: the launcher, and for each kernel its log and a note of its process.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from string import Template

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict

    Request = Dict[str, Any]

KEPT_LOGS = 100
ENDING = 0.5  # seconds for a launcher that was told to end, until the answer that it has not


def folder(*names: str) -> str:
    path = os.path.join(os.path.expanduser("~"), ".cache", "gp", *names)
    os.makedirs(path, mode=0o700, exist_ok=True)
    os.chmod(path, 0o700)
    return path


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def started(pid: int) -> int | None:
    """When a process was started, in ticks since the boot; None: there is none, or only what is left of it."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_there(note: Request) -> bool:
    began = note["started"]  # None: it had ended before this could be told
    return bool(note["boot"] == boot_id() and began is not None and started(note["pid"]) == began)


def note_path(installation: str, kernel_id: str) -> str:
    return os.path.join(folder("kernels", installation), kernel_id + ".json")


def log_path(installation: str, kernel_id: str) -> str:
    return os.path.join(folder("logs", installation), kernel_id + ".log")


# -- questions


def look(request: Request, more: bytes) -> Request:
    """What a first visit wants to know."""
    folder()  # an error now, if there can be none
    stat = os.statvfs(os.path.expanduser("~"))
    return {
        "python": sys.executable,
        "version": list(sys.version_info[:3]),
        "home": os.path.expanduser("~"),
        "clock": time.time(),
        "free": stat.f_bavail * stat.f_frsize,
    }


def load(request: Request, more: bytes) -> Request:
    """How busy this host is, 0 idle and 1 busy: its processors, its memory, and the GPU that is least busy."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = {}
    with open("/proc/meminfo") as file:
        for line in file:
            name, _, rest = line.partition(":")
            memory[name] = int(rest.split()[0])
    busy = {"processors": os.getloadavg()[0] / usable, "memory": 1 - memory["MemAvailable"] / memory["MemTotal"]}
    gpus = gpu_loads()
    if gpus:
        busy["gpu"] = min(gpus)
    return busy


def gpu_loads() -> list[float]:
    """How busy each GPU is, with work or with memory that is taken."""
    asked = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=5, check=False)
        rows = [[float(cell) for cell in line.split(",")] for line in ran.stdout.decode().splitlines()]
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return []
    return [max(work / 100, used / total) for work, used, total in rows]


def reach(request: Request, more: bytes) -> Request:
    """Say whether a launcher here could dial one of the server's addresses."""
    for host, port in request["addresses"]:
        try:
            socket.create_connection((host, port), 1.0).close()
            return {"reached": True}
        except OSError:
            pass
    return {"reached": False}


def start(request: Request, more: bytes) -> Request:
    """Start a launcher that outlives this script: ours, or a command that is one.

    ``more`` is our launcher's file if the server knows of none here.
    """
    if request["prohibited"] and (os.getuid() in request["prohibited"][0] or prohibited_groups(request)):
        return {"prohibited": f"uid {os.getuid()}, groups {sorted(groups())}"}
    if "argv" in request:
        return {"note": begun(request, request["argv"], filled(request["env"], request["secrets"]))}
    path = os.path.join(folder("launchers"), request["launcher"])
    if more:
        put(path, more, request["sha256"])
    elif not os.path.exists(path):
        return {"missing": "launcher"}
    secrets, given = os.pipe()
    argv = [sys.executable, "-I", "-S", path, "--secrets-file=-"] + request["arguments"]
    note = begun(request, argv, stdin=secrets)
    os.close(secrets)
    with os.fdopen(given, "wb") as pipe:  # last: a launcher without a note ends for want of secrets
        pipe.write(request["secrets"].encode())
    return {"note": note}


def begun(request: Request, argv: list[str], env: dict[str, str] | None = None, stdin: int | None = None) -> Request:
    """Start a process, and write the note by which it is known."""
    log = log_path(request["installation"], request["kernel_id"])
    sweep(os.path.dirname(log))
    home, wanted = os.path.expanduser("~"), request.get("cwd") or ""
    with open(log, "ab", opener=lambda name, flags: os.open(name, flags, 0o600)) as output:
        process = subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=output,
            stderr=output,
            cwd=wanted if os.path.isdir(wanted) else home,
            start_new_session=True,
        )
    note = {
        "kernel_id": request["kernel_id"],
        "pid": process.pid,
        "started": started(process.pid),
        "boot": boot_id(),
        "host": os.uname()[1],
        "ours": "argv" not in request,
    }
    put(note_path(request["installation"], request["kernel_id"]), json.dumps(note).encode())
    return note


def filled(env: dict[str, str], secrets: dict[str, str]) -> dict[str, str]:
    """Fill ``${X}`` with this host's variables and the literal ones of the kernel, and add those to this host's."""
    literal = {name: value.replace("$$", "$") for name, value in env.items() if "$" not in value.replace("$$", "")}
    known = {**os.environ, **literal}
    return {**os.environ, **secrets, **{name: Template(value).safe_substitute(known) for name, value in env.items()}}


def groups() -> set[int]:
    return {os.getgid(), *os.getgroups()}


def prohibited_groups(request: Request) -> set[int]:
    return groups().intersection(request["prohibited"][1])


def put(path: str, data: bytes, sha256: str = "") -> None:
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError("the launcher arrived damaged")
    new = f"{path}.{os.urandom(4).hex()}"  # hosts may share the home, and have equal process numbers
    with open(new, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(data)
    os.replace(new, path)


def sweep(logs: str) -> None:
    """Keep the newest logs, to be read after a failure."""
    names = os.listdir(logs)
    if len(names) > 2 * KEPT_LOGS:
        paths = sorted((os.path.join(logs, name) for name in names), key=changed)
        for path in paths[:-KEPT_LOGS]:
            remove(path)


def changed(path: str) -> float:
    try:
        return os.path.getmtime(path)
    except OSError:
        return 0.0  # removed meanwhile by another start


def remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def status(request: Request, more: bytes) -> Request:
    """Say of many kernels whether their launchers run."""
    return {"running": [is_there(note) for note in request["notes"]]}


def kill(request: Request, more: bytes) -> Request:
    """Send a signal to a launcher, which hands it on to its kernel; `main` waits a little if that should end it.

    One that is not ours may leave children, so its end is that of its whole group, whose number is not given away as
    long as one of them is there.
    """
    note, number = request["note"], request["signal"]
    ends = number in (signal.SIGTERM, signal.SIGKILL)
    if note.get("ours", True) or not ends:
        try:
            if is_there(note):
                os.kill(note["pid"], number)
        except ProcessLookupError:
            pass
    elif note["boot"] == boot_id() and started(note["pid"]) in (None, note["started"]):
        try:
            os.killpg(note["pid"], number)
        except ProcessLookupError:
            pass
    return {"ending": note} if ends else {"gone": False}


def logs(request: Request, more: bytes) -> Request:
    """Return the end of a kernel's log."""
    try:
        with open(log_path(request["installation"], request["kernel_id"]), "rb") as file:
            file.seek(max(0, os.path.getsize(file.name) - 1024 * 1024))
            lines = file.read().decode("utf-8", "replace").splitlines(True)
    except OSError:
        lines = []
    return {"text": "".join(lines[-request["tail"] :])}


def discover(request: Request, more: bytes) -> Request:
    """Find the kernels of an installation that run here; notes of others that have ended are removed."""
    found = []
    for name in sorted(os.listdir(folder("kernels", request["installation"]))):
        path = note_path(request["installation"], name[: -len(".json")])
        try:
            with open(path) as file:
                note = json.load(file)
        except (OSError, ValueError):
            continue
        if is_there(note):
            found.append(note)
        elif note["host"] == os.uname()[1]:  # else it may be another host's that has the same home
            remove(path)
    return {"notes": found}


def environments(request: Request, more: bytes) -> Request:
    """Find kernels that could be started here; ``more`` is the text of `gp_launchers.survey`, which only this needs."""
    names: Request = {"__name__": "survey"}
    exec(compile(more, "survey", "exec"), names)
    return {"found": names["found"]()}


QUESTIONS: dict[str, Callable[[Request, bytes], Request]] = {
    "look": look,
    "load": load,
    "reach": reach,
    "start": start,
    "status": status,
    "kill": kill,
    "logs": logs,
    "discover": discover,
    "environments": environments,
}


def answered(request: Request, more: bytes) -> Request:
    try:
        return QUESTIONS[request["ask"]](request, more)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main(asked: Request, more: bytes) -> None:
    """Answer all requests, one after the other; ``more`` comes with a single one."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a lost connection must not leave a half-made file
    os.umask(0o077)
    answers = [answered(request, more) for request in asked["requests"]]
    deadline = time.monotonic() + ENDING  # for all of them
    for answer in answers:
        note = answer.pop("ending", None)
        if note is not None:
            while is_there(note) and time.monotonic() < deadline:
                time.sleep(0.005)
            answer["gone"] = not is_there(note)
    sys.stdout.write(f"\n{asked['mark']} {json.dumps(answers)}\n")
    sys.stdout.flush()
