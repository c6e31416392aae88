"""Jupyter Server and Kernel Gateway, unchanged, as processes: REST, websocket, errors as a user sees them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.installation import Installation, wait_until
from support.servers import Channels, Server, jupyter_server, kernel_gateway, server_behind_gateway

pytestmark = pytest.mark.timeout(120)

PID = "import os; print(os.getpid(), end='')"
LAUNCHER = "import os; print(os.getppid(), end='')"
ENDLESS = "print('running', flush=True)\nwhile True: pass"
SHOW_ENV = "import json, os; print(json.dumps(dict(os.environ)), end='')"


@pytest.fixture
def spec(installation: Installation, ipykernel_spec: Path) -> str:
    """Name of a kernelspec of ipykernel with only our stanza."""
    installation.jupyter.install_spec("remote", ipykernel_spec)
    return "remote"


@contextmanager
def behind_gateway(installation: Installation, *options: str) -> Iterator[Server]:
    """Run Kernel Gateway with these options, and give a Jupyter Server in front of it."""
    with server_behind_gateway(installation, *options) as (server, _):
        yield server


Run = Callable[..., Any]

ALL = {"jupyter-server": jupyter_server, "kernel-gateway": kernel_gateway, "behind-gateway": behind_gateway}


@pytest.fixture(params=ALL)
def run(request: pytest.FixtureRequest) -> Run:
    """How to run each server that a browser may talk to."""
    return ALL[request.param]


# -- a whole life


def test_life(installation: Installation, spec: str, run: Run) -> None:
    with run(installation) as server:
        kernel_id = server.start(spec)
        with server.channels(kernel_id) as kernel:
            assert kernel.run("6*7") == "42"
            assert kernel.run("x = 1; x") == "1"
        with server.channels(kernel_id) as kernel:
            assert kernel.run("x") == "1", "the same kernel for the next websocket"

            cell = kernel.start_cell(ENDLESS, "running")
            server.interrupt(kernel_id)
            assert kernel.reply(cell)["ename"] == "KeyboardInterrupt"
            assert kernel.run("x") == "1"

            first, launcher = kernel.run(PID), kernel.run(LAUNCHER)
            server.restart(kernel_id)
            kernel.ready()
            second = kernel.run(PID)
            assert second != first
            assert kernel.run(LAUNCHER) == launcher, "a restart is in place"
            assert kernel.run("x") == "NameError"

            kernel.start_cell(ENDLESS, "running")
            server.restart(kernel_id)
            kernel.ready()
            assert kernel.run(PID) not in (first, second)

            assert list(server.kernels()) == [kernel_id]
            server.delete(kernel_id)
        assert server.kernels() == {}
        assert server.ask("GET", f"kernels/{kernel_id}").status == 404
        installation.check_nothing_left()


def test_session(installation: Installation, spec: str) -> None:
    wanted = {"name": "n.ipynb", "path": "n.ipynb", "type": "notebook", "kernel": {"name": spec}}
    with jupyter_server(installation) as server:
        answer = server.ask("POST", "sessions", wanted)
        assert answer.status == 201, answer
        kernel_id = answer.body["kernel"]["id"]
        with server.channels(kernel_id) as kernel:
            environment = json.loads(kernel.run(SHOW_ENV))
            assert environment["JPY_SESSION_NAME"].endswith("n.ipynb")
            assert os.path.samefile(
                kernel.run("import os; print(os.getcwd(), end='')"), installation.home / "notebooks"
            )
        assert server.ask("DELETE", f"sessions/{answer.body['id']}").status == 204
        assert server.kernels() == {}
        installation.check_nothing_left()


def test_server_that_ends_takes_its_kernels_along(installation: Installation, spec: str, run: Run) -> None:
    with run(installation) as server:
        busy, idle = server.start(spec), server.start(spec)
        with server.channels(busy) as kernel:
            kernel.start_cell(ENDLESS, "running")
        assert set(server.kernels()) == {busy, idle}
        assert len(installation.records()) == 2
    installation.check_nothing_left()


# -- deaths

RESTARTER = ("--KernelRestarter.time_to_dead=0.2", "--KernelRestarter.stable_start_time=1.0")


def kill(kernel: Channels) -> str:
    """Kill a kernel and return its pid."""
    pid = kernel.run(PID)
    os.kill(int(pid), signal.SIGKILL)
    return pid


def test_autorestart(installation: Installation, spec: str, run: Run) -> None:
    options = () if run is behind_gateway else RESTARTER
    with run(installation, *options) as server:
        kernel_id = server.start(spec)
        with server.channels(kernel_id) as kernel:
            assert kernel.run("x = 1; x") == "1"
            pid = kill(kernel)
            kernel.wait_for_state("restarting", 20)
            kernel.ready()
            assert kernel.run(PID) != pid
            assert kernel.run("x") == "NameError"
            assert kernel.states == ["restarting"]
        assert list(server.kernels()) == [kernel_id]
        server.delete(kernel_id)
        installation.check_nothing_left()


def test_autorestart_gives_up(installation: Installation, ipykernel_spec: Path) -> None:
    broken = installation.home / "broken"
    ipykernel = json.loads((ipykernel_spec / "kernel.json").read_text())["argv"]
    script = f'test -e {broken} && {{ echo it is broken now >&2; exit 3; }}; exec "$@"'
    installation.jupyter.install_spec("fragile", {"argv": ["sh", "-c", script, "sh", *ipykernel]})
    with jupyter_server(installation, *RESTARTER) as server:
        kernel_id = server.start("fragile")
        with server.channels(kernel_id) as kernel:
            broken.touch()
            kill(kernel)
            kernel.wait_for_state("dead", 40)
            assert kernel.states == ["restarting"] * 5 + ["dead"], "as with a local kernel"
        assert server.kernels() == {}, "Jupyter Server forgets it"


# -- culling


def test_culling(installation: Installation, spec: str) -> None:
    options = ("--MappingKernelManager.cull_idle_timeout=1", "--MappingKernelManager.cull_interval=1")
    with jupyter_server(installation, *options) as server:
        idle, busy = server.start(spec), server.start(spec)
        with server.channels(idle) as kernel:
            assert kernel.run("6*7") == "42"
        with server.channels(busy) as kernel:
            kernel.start_cell(ENDLESS, "running")
        wait_until(lambda: idle not in server.kernels(), 30, every=0.1)
        assert list(server.kernels()) == [busy], "only who does nothing is culled"
        wait_until(lambda: len(installation.records()) == 1, 10)
        server.delete(busy)
        installation.check_nothing_left()


# -- variables of the start request


def test_variables_of_the_request(installation: Installation, spec: str) -> None:
    asked = {"KERNEL_COLOUR": "blue", "KERNEL_TEXT": "a b\n$HOME ${X} {y}", "CHOSEN": "c", "OTHER": "o"}
    with kernel_gateway(installation, "--JupyterWebsocketPersonality.env_whitelist=CHOSEN") as server:
        kernel_id = server.start(spec, env=asked)
        with server.channels(kernel_id) as kernel:
            for _ in range(2):
                seen = json.loads(kernel.run(SHOW_ENV))
                expected = {
                    "KERNEL_COLOUR": "blue",
                    "KERNEL_TEXT": asked["KERNEL_TEXT"],
                    "CHOSEN": "c",
                    "OTHER": None,  # Kernel Gateway lets through KERNEL_* and what its operator has listed
                    "KERNEL_GATEWAY": "1",  # it adds this one itself, after pre_launch
                    "KERNEL_ID": kernel_id,
                }
                assert {name: seen.get(name) for name in expected} == expected
                server.restart(kernel_id)  # keeps them
                kernel.ready()
        other = server.start(spec, env={"KERNEL_COLOUR": "red"})
        with server.channels(other) as kernel:
            seen = json.loads(kernel.run(SHOW_ENV))
            assert (seen["KERNEL_COLOUR"], seen.get("KERNEL_TEXT"), seen["KERNEL_ID"]) == ("red", None, other)


def test_variables_of_a_server_behind_a_gateway(installation: Installation, spec: str) -> None:
    # without a variable in the start request, Jupyter Server sends its own KERNEL_*
    with server_behind_gateway(installation, env={"KERNEL_COLOUR": "blue"}) as (server, gateway):
        kernel_id = server.start(spec)
        assert list(gateway.kernels()) == [kernel_id]
        with server.channels(kernel_id) as kernel:
            seen = json.loads(kernel.run(SHOW_ENV))
            assert seen["KERNEL_COLOUR"] == "blue"


def test_kernel_gets_nothing_of_the_environment_of_its_server(installation: Installation, spec: str, run: Run) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OF_THE_SERVER", "s")
        with run(installation) as server, server.channels(server.start(spec)) as kernel:
            seen = json.loads(kernel.run(SHOW_ENV))
    assert not {"OF_THE_SERVER", "JUPYTER_TOKEN", "KG_AUTH_TOKEN", "JUPYTER_GATEWAY_AUTH_TOKEN"} & set(seen)


# -- errors that people can read

PENDING = "--AsyncMultiKernelManager.use_pending_kernels=True"

DIES = "import sys; print('line one', file=sys.stderr); print('no spoon: %s, 100%', file=sys.stderr); sys.exit(3)"

SHOWN = {
    "dying": (
        503,
        "KernelDied",
        # tornado, and the client of a gateway, format what they are given: gp gives them no per cent sign
        ["(dying) ended with exit code 3", "[KernelDied]", "line one\nno spoon:  percents, 100 percent", "ipykernel"],
    ),
    "missing": (503, "CommandNotFound", ["(missing)", "gp-no-such-command", "[CommandNotFound]"]),
    "denied": (403, "Denied", ["may not start this kernel (authorized_users)"]),
}
"""HTTP status, reason and parts of the text, by kernelspec."""


@pytest.fixture
def failing_specs(installation: Installation, spec: str, ipykernel_spec: Path) -> None:
    """Install the kernelspecs of `SHOWN`."""
    installation.jupyter.install_spec("dying", {"argv": [sys.executable, "-c", DIES, "{connection_file}"]})
    installation.jupyter.install_spec("missing", {"argv": ["gp-no-such-command", "{connection_file}"]})
    installation.jupyter.install_spec("denied", ipykernel_spec, config={"authorized_users": ["nobody-else"]})


def session_of(name: str) -> dict[str, Any]:
    """Return the request for a session with a kernel."""
    return {"name": name, "path": f"{name}.ipynb", "type": "notebook", "kernel": {"name": name}}


@pytest.mark.usefixtures("failing_specs")
def test_errors(installation: Installation, spec: str, run: Run) -> None:
    with run(installation) as server:
        for name, (status, reason, parts) in SHOWN.items():
            answer = server.ask("POST", "kernels", {"name": name})
            assert answer.status == status, answer
            if run is behind_gateway:
                # Upstream's formatting (jupyter_server.gateway.gateway_client, 2.21): the text is in the arguments of
                # its HTTPError, and its handler shows the format alone. /api/sessions, which browsers use, has ours.
                assert answer.text.startswith("Error from Gateway: ["), answer
            else:
                assert answer.body["reason"] == reason
                assert_shown(answer.text, parts)

            answer = server.ask("POST", "sessions", session_of(name))
            assert answer.status == 500, "Jupyter Server makes it one of its own"
            assert_shown(answer.text, parts)

            assert server.kernels() == {}
            assert server.ask("GET", "sessions").body == []
        installation.check_nothing_left()
        goes_on(server, spec)
        installation.check_nothing_left()


@pytest.mark.usefixtures("failing_specs")
def test_errors_of_pending_kernels(installation: Installation, spec: str, run: Run) -> None:
    with run(installation, PENDING) as server:
        for name, (_, _, parts) in SHOWN.items():
            answer = server.ask("POST", "kernels", {"name": name})
            assert answer.status == 201, "it is not known yet"
            assert_shown(reason_of_death(server, answer.body["id"]), parts)
            server.delete(answer.body["id"])

            answer = server.ask("POST", "sessions", session_of(name))
            assert answer.status == 201, "it is not known yet"
            assert_shown(reason_of_death(server, answer.body["kernel"]["id"]), parts)
            (listed,) = server.ask("GET", "sessions").body
            # Jupyter Server behind a gateway has it from its last look at the gateway's kernels, which was just now
            assert_shown(listed["kernel"]["reason"], parts)
            assert server.ask("DELETE", f"sessions/{answer.body['id']}").status == 204
            assert server.kernels() == {}
        installation.check_nothing_left()
        goes_on(server, spec)
        installation.check_nothing_left()


def goes_on(server: Server, spec: str) -> None:
    """Check that a server still starts kernels."""
    kernel_id = server.start(spec)
    with server.channels(kernel_id) as kernel:
        assert kernel.run("6*7") == "42"
    server.delete(kernel_id)
    # a pending kernel's end is waited for by nobody else
    wait_until(lambda: server.kernels() == {}, 20, every=0.1)


def assert_shown(text: str, parts: list[str]) -> None:
    """Check that a user sees all parts of an error."""
    missing = [part for part in parts if part not in text]
    assert not missing, text


def reason_of_death(server: Server, kernel_id: str, within: float = 20.0) -> str:
    """Wait until a server lists a kernel as dead, and return the reason it gives."""
    deadline = time.monotonic() + within
    while (model := server.kernels()[kernel_id])["execution_state"] != "dead":
        assert time.monotonic() < deadline, model
        time.sleep(0.05)
    return str(model["reason"])
