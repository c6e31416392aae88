"""Kernels in containers and in a Swarm: ours, the peer's, made by hand, and local ones; engines are on this machine."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contestants import Contestant
from docker.errors import APIError
from harness import PROGRAMS, Failed, Goal, Program, Row, Series
from jupyter_client.blocking import BlockingKernelClient
from starts import in_turn

sys.path.append(str(Path(__file__).parents[1] / "tests/integration"))
from clusters.availability import Unavailable
from clusters.docker import IMAGE, Engine, Swarm

STEPS = ("docker-start", "docker-restart", "docker-death", "docker-kill")
FIGURES = (*STEPS, "docker-crowd", "docker-watch", "swarm-start")
COUNT, WATCHED = 20, 100
IPYKERNEL = ["python3", "-m", "ipykernel_launcher"]
INSTANT = ["python3", "-I", "-S", "/opt/instant_kernel.py", "{connection_file}"]
QUIET = ["python3", "/opt/blast_kernel.py", "{connection_file}"]  # speaks ZeroMQ: one that does not is dialled for ever
PORTS = {name: 5001 + number for number, name in enumerate(("shell", "iopub", "stdin", "control", "hb"))}


class Stage:
    """An engine with an image, and contestants that start kernels on it.

    Args:
        work: Folder for all that is written.
        peer: Whether the peer takes part.

    Raises:
        Unavailable: There can be no engine here.
    """

    def __init__(self, work: Path, *, peer: bool) -> None:
        self.folder = work / "docker"
        self.folder.mkdir()
        self.engine = Engine("b1", self.folder / "b1", "--debug")
        self.contestants: list[Contestant] = []
        try:
            self.engine.up()
            self.quick = _with_quick_kernels(self.engine)
            for name in ("ours", "local", *(["peer"] if peer else [])):
                self.contestants.append(self._contestant(name))
        except BaseException:
            self.close()
            raise

    def _contestant(self, name: str) -> Contestant:
        if name == "local":
            return Contestant(name, self.folder)
        made = Contestant(name, self.folder, env={"DOCKER_HOST": self.engine.url})
        stanza = {"provisioner_name": "docker-provisioner", "config": {"image_name": IMAGE}}
        if name == "ours":
            made.install("ipykernel-boxed", [*IPYKERNEL, "-f", "{connection_file}"], stanza)
            made.install("quiet-boxed", QUIET, {**stanza, "config": {"image_name": self.quick}})
            return made
        code = "import gateway_provisioners; print(gateway_provisioners.__path__[0])"
        told = subprocess.run((made.python, "-c", code), check=True, capture_output=True, text=True).stdout
        here = Path(told.strip())
        argv = [made.python, str(here / "kernel-launchers/docker/scripts/launch_docker.py")]
        argv += ["--kernel-id", "{kernel_id}", "--port-range", "{port_range}"]
        argv += ["--response-address", "{response_address}", "--public-key", "{public_key}"]
        image = self.engine.peer_image(here.parent)
        made.install("ipykernel-boxed", argv, {**stanza, "config": {"image_name": image}})
        return made

    def named(self, *names: str) -> list[Contestant]:
        """Return some of the contestants."""
        return [contestant for contestant in self.contestants if contestant.name in names]

    def sweep(self) -> None:
        """Remove what the peer has left."""
        with self.engine.client() as client:
            while left := client.containers(all=True):
                for one in left:
                    with contextlib.suppress(APIError):  # the engine removes it at this moment
                        client.remove_container(one["Id"], force=True)
                time.sleep(0.05)

    def close(self) -> None:
        """End it; nothing remains."""
        for contestant in self.contestants:
            contestant.close()
        self.engine.remove()


def _with_quick_kernels(engine: Engine) -> str:
    files = {name: PROGRAMS / name for name in ("instant_kernel.py", "blast_kernel.py")}
    return engine.image("quick", "COPY *.py /opt/", files=files)


def measure(work: Path, wanted: set[str], *, quick: bool, peer: bool) -> list[Row]:
    """Measure what is wanted."""
    rows: list[Row] = []
    try:
        if wanted - {"swarm-start"}:
            stage = Stage(work, peer=peer)
            try:
                if wanted & set(STEPS):
                    rows += _life(stage, wanted, 3 if quick else 11)
                if "docker-crowd" in wanted:
                    rows += _crowd(stage, 1 if quick else 5)
                if "docker-watch" in wanted:
                    rows += _watch(stage, 20 if quick else WATCHED, 20 if quick else 60)
            finally:
                stage.close()
        if "swarm-start" in wanted:
            rows += _swarm(work, 3 if quick else 11)
    except Unavailable as reason:
        row = Row("kernels in containers", "ms", Series())
        row.series.fail("ours", str(reason))
        rows.append(row)
    return rows


def _life(stage: Stage, wanted: set[str], rounds: int) -> list[Row]:
    rows = {
        "docker-start": Row("in a container: start to ready", "ms", Series(), Goal(1.1, of="by hand")),
        "docker-restart": Row("in a container: restart", "ms", Series(), Goal(1.2, of="local")),
        "docker-death": Row("in a container: kill -9 of the kernel until poll() says so", "ms", Series(), Goal(100)),
        "docker-kill": Row(
            "in a container: docker kill until poll() says so", "ms", Series(), Goal(25, of="by hand", how="difference")
        ),
    }
    ours, local, peers = stage.named("ours"), stage.named("local"), stage.named("peer")
    for number in range(-1, rounds):
        starts = rows["docker-start"].series
        in_turn([*ours, *(peers if number < max(1, rounds // 4) else [])], starts, _started)
        in_turn(local, starts, lambda contestant: 1000 * contestant.host.ask("start", kernel="ipykernel"))
        starts.add("by hand", 1000 * _by_hand(stage.engine))
        rows["docker-kill"].series.add("by hand", 1000 * _kill_by_hand(stage.engine))
        in_turn([*ours, *local], rows["docker-restart"].series, lambda one: 1000 * one.host.ask("restart", now=False))
        in_turn(ours, rows["docker-death"].series, lambda one: 1000 * _killed(one, lambda: _kill_kernel(stage.engine)))
        for contestant in ours:
            contestant.forget()
            _started(contestant)
        in_turn(
            ours, rows["docker-kill"].series, lambda one: 1000 * _killed(one, lambda: _kill_container(stage.engine))
        )
        for contestant in stage.contestants:
            contestant.forget()
        stage.sweep()
        if number < 0:
            for row in rows.values():
                row.series.forget()
    faster = rows["docker-start"].series.compared("peer", "ours", lambda theirs, mine: theirs / mine)
    if faster:
        rows["docker-start"].notes.append(f"{faster.median:.1f} times as fast as the peer (goal: 1.5)")
    return [row for step, row in rows.items() if step in wanted]


def _started(contestant: Contestant) -> float:
    return 1000 * float(contestant.host.ask("start", kernel="ipykernel-boxed"))


def _by_hand(engine: Engine) -> float:
    """Seconds of what docker run does, until the kernel answers at the container's own address."""
    options = [f"--{name}={port}" for name, port in PORTS.items()]
    with engine.client() as client:
        began = time.perf_counter()
        command = [*IPYKERNEL, "--ip=0.0.0.0", *options, "--Session.key=by-hand"]
        made = client.create_container(IMAGE, command, user="1000:100")["Id"]
        try:
            client.start(made)
            ip = client.inspect_container(made)["NetworkSettings"]["IPAddress"]
            kernel = BlockingKernelClient()
            ports = {f"{name}_port": port for name, port in PORTS.items()}
            how = {"transport": "tcp", "signature_scheme": "hmac-sha256", "key": b"by-hand"}
            kernel.load_connection_info({**how, "ip": ip, **ports})
            kernel.start_channels(hb=False, stdin=False, iopub=False)
            kernel.kernel_info(reply=True, timeout=60)
            took = time.perf_counter() - began
            kernel.stop_channels()
            return took
        finally:
            client.remove_container(made, force=True)


def _killed(contestant: Contestant, kill: Callable[[], object]) -> float:
    contestant.host.tell("gone")
    time.sleep(0.2)  # now it looks
    began = time.perf_counter()  # the same clock in all processes
    kill()
    return float(contestant.host.answer()) - began


def _kill_kernel(engine: Engine) -> None:
    engine.inside("pkill", "-KILL", "-f", "^python3 -m ipykernel_launcher -f")


def _kill_container(engine: Engine) -> None:
    with engine.client() as client:
        for one in client.containers(filters={"label": "gp.installation"}):
            client.kill(one["Id"])


def _kill_by_hand(engine: Engine) -> float:
    """Seconds until the engine itself says of a container that is killed that it does not run."""
    with engine.client() as client:
        made = client.create_container(IMAGE, ["sleep", "600"])["Id"]
        client.start(made)
        began = time.perf_counter()
        client.kill(made)
        while client.inspect_container(made)["State"]["Running"]:
            pass
        took = time.perf_counter() - began
        client.remove_container(made)
        return took


def _crowd(stage: Stage, rounds: int) -> list[Row]:
    ready = Row(f"in containers: {COUNT} starts at once, all ready", "ms", Series(), Goal(0.5, of="peer"))
    late = Row(
        "in containers: event loop's lag meanwhile, longest", "ms", Series(), Goal(5, of="bare", how="difference")
    )
    (ours,), peers = stage.named("ours"), stage.named("peer")
    (local,) = stage.named("local")
    for number in range(rounds):
        local.host.ask("watch")  # a host that does nothing, beside one that starts kernels
        for contestant in (ours, *(peers if number < 2 else ())):
            try:
                found: dict[str, Any] = contestant.host.ask("crowd", count=COUNT, kernel="ipykernel-boxed", timeout=180)
            except Failed as error:
                ready.series.fail(contestant.name, str(error))
                contestant.renew()
                continue
            if contestant is ours:
                late.series.add("bare", 1000 * local.host.ask("noticed")["longest"])
            contestant.forget()
            stage.sweep()
            if found["failures"]:
                ready.series.fail(contestant.name, f"{len(found['failures'])} failed: {found['failures'][0]}")
                continue
            ready.series.add(contestant.name, 1000 * found["seconds"])
            late.series.add(contestant.name, 1000 * found["lag"]["longest"])
    return [ready, late]


def _watch(stage: Stage, kernels: int, seconds: float) -> list[Row]:
    cpu = Row(f"in containers: CPU of the host process, {kernels} idle kernels", "%", Series(), Goal(2))
    calls = Row(f"in containers: calls of the engine a minute, {kernels} idle kernels", "", Series(), Goal(10))
    (ours,) = stage.named("ours")
    watcher = Program("watcher", stage.folder / "watcher.log")
    try:
        for number in range(0, kernels, COUNT):
            ours.host.ask("crowd", count=min(COUNT, kernels - number), kernel="quiet-boxed", more=True, timeout=180)
        time.sleep(15)  # what a start leaves to be done
        watcher.ask("start")
        asked, before = _calls(stage.engine), watcher.ask("cpu")
        found = ours.host.ask("idle", kernels=0, seconds=seconds, clients_too=False, timeout=600)
        watcher.ask("stop")
        calls.series.add("ours", (_calls(stage.engine) - asked) * 60 / (seconds + 1))
        cpu.series.add("ours", 100 * max(0.0, found["cpu"] - (watcher.ask("cpu") - before) / seconds))
        ours.forget()
    finally:
        watcher.close()
    return [cpu, calls]


def _calls(engine: Engine) -> int:
    return (engine.folder / "engine.log").read_text().count('msg="Calling ')


def _swarm(work: Path, rounds: int) -> list[Row]:
    row = Row("in a Swarm: start (kernel ready at once)", "ms", Series(), Goal(1.15, of="by hand"))
    row.notes.append("by hand: service create until its task is Running, asked every 20 ms")
    swarm, contestant = Swarm(2), None
    try:
        swarm.up()
        for engine in swarm.engines:
            image = _with_quick_kernels(engine)
        contestant = Contestant("ours", work / "swarm", env={"DOCKER_HOST": swarm.manager.url})
        config = {"image_name": image, "constraints": ["node.role==worker"]}
        contestant.install("instant-boxed", INSTANT, {"provisioner_name": "docker-swarm-provisioner", "config": config})
        for number in range(-1, rounds):
            row.series.add("by hand", 1000 * _service_by_hand(swarm, image))
            row.series.add("ours", 1000 * contestant.host.ask("start", kernel="instant-boxed"))
            contestant.forget()
            if number < 0:
                row.series.forget()
    finally:
        if contestant is not None:
            contestant.close()
        swarm.down()
    return [row]


def _service_by_hand(swarm: Swarm, image: str) -> float:
    inside = {"Image": image, "Args": ["python3", "-c", "import time; time.sleep(600)"], "User": "1000:100"}
    placement = {"Constraints": ["node.role==worker"]}
    with swarm.manager.client() as client:
        began = time.perf_counter()
        made = client.create_service(
            {"ContainerSpec": inside, "RestartPolicy": {"Condition": "none"}, "Placement": placement}, name="by-hand"
        )["ID"]
        try:
            while [one["Status"]["State"] for one in client.tasks(filters={"service": made})] != ["running"]:
                time.sleep(0.02)
            return time.perf_counter() - began
        finally:
            client.remove_service(made)
            while swarm.engines[1].counts()["containers"]:
                time.sleep(0.05)
