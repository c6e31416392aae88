"""Engines that answer, refuse, hang and are not there; contexts; tasks of a Swarm. No engine is needed."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Coroutine
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from docker.errors import APIError
from requests import ConnectionError as NoConnection

from gp_core import LaunchDenied, LaunchFailed, State
from gp_core.errors import ConfigError
from gp_core.runtime import runtime
from gp_docker import engine as engine_module
from gp_docker.backend import DockerBackend
from gp_docker.connection import Endpoint, _client, endpoint
from gp_docker.engine import Engine
from gp_docker.images import present
from gp_docker.reasons import EngineUnreachable, Refused
from gp_docker.swarm import SwarmBackend, _network


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return runtime().submit(work).result(30)


class Client:
    """An engine's client, as far as it is used here."""

    def __init__(self) -> None:
        self.streams: list[list[dict[str, Any]]] = []
        self.more = threading.Event()
        self.state = "running"

    def events(self, **how: Any) -> Any:
        if not self.streams:
            raise NoConnection("gone")
        events = self.streams.pop(0)
        client = self

        class Stream:
            def __iter__(self) -> Any:
                client.more.wait(10)
                yield from events

            def close(self) -> None:
                client.more.set()

        return Stream()

    def inspect_container(self, container: str) -> dict[str, Any]:
        if self.state == "none":
            raise api_error(404, "No such container")
        return {"State": {"Status": self.state, "ExitCode": 3}}


def api_error(status: int, said: str) -> APIError:
    class Response:
        status_code = status
        reason = said
        url = "http://engine"

    return APIError(said, response=Response(), explanation=said)


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
def engine(client: Client, monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine(Endpoint("test", "unix:///none"))
    monkeypatch.setattr(made, "_connect", lambda: client)
    return made


def test_an_error_of_the_engine_is_a_refusal(engine: Engine) -> None:
    def work(client: Client) -> None:
        raise api_error(409, "in use")

    with pytest.raises(Refused, match="in use") as caught:
        run(engine.do(work))
    assert caught.value.status == 409


def test_no_answer_says_nothing_about_kernels(engine: Engine) -> None:
    def work(client: Client) -> None:
        raise NoConnection("reset")

    with pytest.raises(EngineUnreachable, match="engine test does not answer"):
        run(engine.do(work))


def test_an_engine_that_hangs_is_not_waited_for(engine: Engine) -> None:
    let_go = threading.Event()
    began = time.monotonic()
    with pytest.raises(EngineUnreachable, match=r"within 0\.1 s"):
        run(engine.do(lambda client: let_go.wait(10), patience=0.1))
    assert time.monotonic() - began < 5
    let_go.set()


def test_a_hanging_engine_does_not_delay_another(engine: Engine, client: Client) -> None:
    let_go, other = threading.Event(), Engine(Endpoint("other", "unix:///none"))
    other._connect = lambda: client  # type: ignore[method-assign]

    async def both() -> float:
        hanging = [asyncio.ensure_future(engine.do(lambda client: let_go.wait(20), patience=10)) for _ in range(100)]
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await other.status("c1")
        took = time.monotonic() - began
        let_go.set()
        await asyncio.gather(*hanging)
        return took

    assert run(both()) < 2


def test_calls_that_were_given_up_still_count(engine: Engine, client: Client) -> None:
    """They have their threads until the engine answers; others need some, too."""
    let_go, begun = threading.Event(), []

    def hang(client: Client) -> None:
        begun.append(1)
        let_go.wait(20)

    async def many() -> None:
        for _ in range(3):
            calls = (engine.do(hang, patience=0.2) for _ in range(20))
            await asyncio.gather(*calls, return_exceptions=True)

    run(many())
    assert len(begun) == engine_module.MOST
    let_go.set()
    assert run(engine.status("c1")).state is State.RUNNING
    assert len(begun) == engine_module.MOST, "nor are they made up for when nobody waits any more"


def test_what_is_made_too_late_is_undone(engine: Engine, client: Client) -> None:
    let_go, undone = threading.Event(), []

    def make(client: Client) -> str:
        let_go.wait(10)
        return "made"

    with pytest.raises(EngineUnreachable):
        run(engine.do(make, patience=0.1, undo=lambda client, made: undone.append(made)))
    let_go.set()
    deadline = time.monotonic() + 5
    while not undone:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert run(engine.do(lambda client: "x", undo=lambda client, made: undone.append(made))) == "x"
    assert undone == ["made"]


def test_an_engine_that_hangs_is_asked_for_events_once(
    engine: Engine, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PATIENCE", 0.05)
    monkeypatch.setattr(engine_module, "OPENED", 0.01)
    monkeypatch.setattr(engine_module, "LINGER", 0.02)
    let_go, asked = threading.Event(), []

    def events(**how: Any) -> Any:
        asked.append(how)
        let_go.wait(10)
        raise NoConnection("at last")

    client.events = events  # type: ignore[method-assign]

    async def watch() -> None:
        for _ in range(5):
            async with engine.changes("c1") as changes:
                await changes.next(0.05)
            await asyncio.sleep(0.3)

    run(watch())
    let_go.set()
    assert len(asked) == 1


def test_a_pull_that_hangs_is_not_waited_for_twice(engine: Engine, client: Client) -> None:
    let_go, pulls = threading.Event(), []

    def pull(name: str, **how: Any) -> list[dict[str, Any]]:
        pulls.append(name)
        let_go.wait(10)
        return []

    def none(name: str) -> None:
        raise api_error(404, "No such image")

    client.inspect_image, client.pull, client.reload_config = none, pull, lambda: None  # type: ignore[attr-defined]
    how: Any = {"policy": "missing", "platform": "", "timeout": 0.1, "kernel_id": "k1", "progress": str}
    for _ in range(2):
        with pytest.raises(LaunchFailed, match="PullTimeout"):
            run(present(engine, "python:3.12", **how))
    deadline = time.monotonic() + 10
    while len(pulls) < 2:  # the second one has a thread of its own, too
        assert time.monotonic() < deadline
        time.sleep(0.01)
    let_go.set()


def test_whoever_has_started_nothing_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers of others have no label of an installation, or one of theirs."""
    for backend in (DockerBackend, SwarmBackend):
        monkeypatch.setattr(backend, "installation", "")
        assert run(backend(engine="unix:///none").discover()) == []


def test_what_a_killed_process_has_left_is_removed_and_what_others_use_is_not(engine: Engine, client: Any) -> None:
    seen, removed = [["left", "used"], ["left", "new"]], []
    client.containers = lambda **how: [{"Id": one} for one in seen.pop(0)]
    client.remove_container = lambda name, **how: removed.append(name)
    run(engine.remove_stale("gp.look", 0.01))
    assert removed == ["left"]


def test_services_are_in_no_network_of_their_node() -> None:
    def network(scope: str, driver: str) -> Any:
        return Mock(inspect_network=Mock(return_value={"Id": "n1", "Scope": scope, "Driver": driver}))

    for scope, driver in (("local", "host"), ("swarm", "host"), ("local", "bridge")):
        with pytest.raises(LaunchDenied, match="not for services"):
            _network(network(scope, driver), "3f", "k1")
    assert _network(network("swarm", "overlay"), "net", "k1") == "n1"


def test_limits_of_services() -> None:
    limits, wanted = SwarmBackend(cpus="2", reserve_cpus="0", memory="1Gi")._resources()
    assert limits == {"NanoCPUs": 2 * 10**9, "MemoryBytes": 2**30, "Pids": 4096}
    assert wanted == {"NanoCPUs": 0, "MemoryBytes": 2**30}
    assert SwarmBackend(pids_limit=-1)._resources() == ({"Pids": 0}, {})


def test_it_is_connected_to_again(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(Endpoint("test", "unix:///none"))
    for problem, said in (
        (NoConnection("not yet"), "does not answer: not yet"),
        (api_error(400, "TLS"), "take us: TLS"),
    ):
        monkeypatch.setattr("gp_docker.connection.connect", Mock(side_effect=problem))
        with pytest.raises(EngineUnreachable, match=f"engine test .*{said}"):
            run(engine.status("c1"))
    monkeypatch.setattr("gp_docker.connection.connect", Mock(return_value=client))
    assert run(engine.status("c1")).state is State.RUNNING


def test_events_wake_those_that_wait_for_them(engine: Engine, client: Client) -> None:
    client.streams = [[{"Action": "die", "Actor": {"ID": "c1"}}, {"Action": "die", "Actor": {"ID": "c2"}}]]

    async def heard() -> float:
        async with engine.changes("c1") as changes:
            changes.clear()
            began = time.monotonic()
            client.more.set()
            await changes.next(10)
            return time.monotonic() - began

    assert run(heard()) < 2


def test_the_end_of_the_stream_wakes_too_and_it_is_opened_again(engine: Engine, client: Client) -> None:
    client.streams = [[], [{"Action": "die", "Actor": {"ID": "c1"}}]]
    client.more.set()

    async def heard() -> int:
        async with engine.changes("c1") as changes:
            for _ in range(50):
                if not client.streams:
                    break
                changes.clear()
                await changes.next(1)
        return len(client.streams)

    assert run(heard()) == 0


def test_a_container_that_is_not_there_has_ended(engine: Engine, client: Client) -> None:
    client.state = "none"
    assert run(engine.status("c1")).state is State.GONE


# -- which engine


def test_an_engine_far_away_whose_machine_dies_is_noticed() -> None:
    """The library waits without limit for events and pulls."""
    for url in ("tcp://box:2375", "https://box:2376"):
        with closing(_client(Endpoint("box", url), "1.41")) as made:
            options = made.get_adapter(f"{made.base_url}/x").poolmanager.connection_pool_kw["socket_options"]
            assert (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1) in options


def test_contexts_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    assert endpoint("").url == "unix:///var/run/docker.sock"
    monkeypatch.setenv("DOCKER_HOST", "tcp://box:2375")
    assert (endpoint("").url, endpoint("").host) == ("tcp://box:2375", "box")
    assert endpoint("ssh://ada@gpu:2222").host == "gpu"
    assert endpoint("unix:///x").is_local
    with pytest.raises(ConfigError, match="there is no docker context 'nowhere'"):
        endpoint("nowhere")


def test_a_context_is_read_from_the_commands_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / ".docker"))
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    (tmp_path / ".docker").mkdir()
    (tmp_path / ".docker/config.json").write_text("{}")  # the library looks beside it only
    folder = tmp_path / ".docker/contexts/meta" / hashlib.sha256(b"gpu").hexdigest()
    folder.mkdir(parents=True)
    ends = {"docker": {"Host": "tcp://gpu:2376", "SkipTLSVerify": False}}
    (folder / "meta.json").write_text(json.dumps({"Name": "gpu", "Metadata": {}, "Endpoints": ends}))
    assert endpoint("gpu").url == "tcp://gpu:2376"


# -- tasks of a Swarm


@pytest.mark.parametrize(
    ("status", "desired", "node", "expected"),
    [
        ({"State": "pending", "Err": "no suitable node (x)"}, "running", "ready", ("pending", "NoSuitableNode")),
        ({"State": "preparing"}, "running", "ready", ("pending", None)),
        ({"State": "running"}, "running", "ready", ("running", None)),
        ({"State": "running"}, "shutdown", "down", ("gone", "NodeDown")),
        ({"State": "running"}, "remove", "ready", ("running", None)),
        ({"State": "rejected", "Err": "No such image: x"}, "shutdown", "ready", ("gone", "ImageNotFound")),
        ({"State": "rejected", "Err": "mount failed"}, "shutdown", "ready", ("gone", "Rejected")),
        ({"State": "complete", "ContainerStatus": {"ExitCode": 0}}, "shutdown", "ready", ("gone", "ContainerEnded")),
        ({"State": "failed", "ContainerStatus": {"ExitCode": 137}}, "shutdown", "ready", ("gone", "ContainerEnded")),
        ({"State": "new to us"}, "running", "ready", ("unknown", None)),
    ],
)
def test_what_a_task_means(
    engine: Engine, client: Any, status: dict[str, Any], desired: str, node: str, expected: tuple[str, str | None]
) -> None:
    client.inspect_node = lambda _: {"Description": {"Hostname": "n2"}, "Status": {"State": node}}
    task = {"Status": status, "DesiredState": desired, "NodeID": "abc"}
    seen = run(SwarmBackend()._of_task(engine, task))
    assert (seen.state.value, seen.reason and seen.reason.code) == expected
    assert "n2" in seen.detail
