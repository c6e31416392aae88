"""gp-docker in a real Swarm of two engines: the contract, and kernels whose node dies."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from clusters.availability import offer
from clusters.docker import IMAGE, Swarm
from docker.errors import APIError
from support.boxed import Boxed, boxing
from support.installation import Installation, wait_until

from gp_core.cli import main
from gp_core.errors import GPError
from gp_core.testing import BackendContract
from gp_core.testing.contract import on_runtime
from gp_core.testing.harness import Installation as Gp
from gp_docker.swarm import SwarmBackend

pytestmark = [pytest.mark.timeout(300), pytest.mark.relay]


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    """Two engines with the image."""
    made = Swarm(2)
    try:
        offer("swarm", made.up)
        yield made
    finally:
        made.down()


class TestContract(BackendContract):
    """On a manager that is stopped in some tests."""

    backend_class = SwarmBackend
    python = "python3"
    start_timeout, end_timeout, settle, test_timeout = 30.0, 20.0, 1.0, 100.0

    unknown_job = {"service": "0" * 25}
    waivers = {
        "test_kernel_gets_its_environment_and_can_be_reached": "a task has an address in its overlay network only"
    }

    @pytest.fixture
    def backend_options(self, swarm: Swarm) -> dict[str, Any]:
        return {"engine": swarm.manager.url, "image_name": IMAGE, "constraints": ["node.role==worker"]}

    @pytest.fixture
    def break_platform(self, swarm: Swarm) -> Callable[[], AbstractContextManager[object]]:
        return swarm.manager.hanging

    @on_runtime
    async def test_kernel_gets_its_environment_and_can_be_reached(self, gp: Gp) -> None:
        """The same through its launcher alone."""
        started = await gp.start(gp.request(env={"GP_CONTRACT": "it's $$HOME"}))
        seen = await started.ask()
        assert seen["env"]["GP_CONTRACT"] == "it's $HOME"
        assert seen["env"]["KERNEL_ID"] == started.kernel_id


@pytest.fixture
def kernel(
    installation: Installation, swarm: Swarm, ipykernel_spec: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Boxed]:
    """Start an ipykernel as a service."""
    monkeypatch.setenv("DOCKER_HOST", swarm.manager.url)
    with boxing(installation, ipykernel_spec, swarm.manager, "docker-swarm-provisioner") as boxed:
        yield boxed


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_life_on_a_node(kernel: Boxed, node: str) -> None:
    with kernel(constraints=[f"node.hostname=={node}"], memory="512Mi", cpus="1") as used:
        assert "1000 100" in used.run("import os; x = 6; print(os.getuid(), os.getgid())")
        cell = used.start_cell("print('running', flush=True)\nwhile True: pass", "running")
        used.do(used.manager.interrupt_kernel())
        assert used.reply(cell)["ename"] == "KeyboardInterrupt"
        assert "42" in used.run("x * 7")
        used.restart()
        assert "NameError" in used.run("x")


@pytest.mark.parametrize(
    ("config", "reason", "said"),
    [
        ({"constraints": ["node.labels.gpu==none"]}, "NoSuitableNode", "no suitable node"),
        ({"reserve_memory": "2Ti"}, "NoSuitableNode", "insufficient resources"),
        ({"image_name": "127.0.0.1:5000/none:1", "user": "1000:100"}, "ImageNotFound|RegistryUnreachable", "none:1"),
        ({"python": "python4"}, "CommandNotFound", "python4"),
        ({"user": "0"}, None, "prohibited_uids"),
        ({"networks": ["host"]}, None, "host_network"),
        ({"volumes": ["/etc:/mnt"]}, None, "allowed_volumes"),
    ],
)
def test_why_a_kernel_does_not_start(kernel: Boxed, config: dict[str, Any], reason: str | None, said: str) -> None:
    with kernel(start=False, launch_timeout=5, **config) as used:
        with pytest.raises(GPError) as caught:
            used.do(used.manager.start_kernel())
        text = str(caught.value)
        assert said in text, text
        assert reason is None or re.search(rf"\[({reason})\]", text), text


def test_networks_of_services(kernel: Boxed, swarm: Swarm) -> None:
    with swarm.manager.client() as client:
        host = client.inspect_network("host")["Id"]
        made = client.create_network("gp-test", driver="overlay")["Id"]
    try:
        with kernel(start=False, networks=[host[:12]]) as used, pytest.raises(GPError, match="its node's own"):
            used.do(used.manager.start_kernel())
        with kernel(networks=["gp-test"]) as used, swarm.manager.client() as client:
            assert "42" in used.run("6 * 7")
            (service,) = client.services(filters={"label": "kernel_id"})
            assert [one["Target"] for one in service["Spec"]["TaskTemplate"]["Networks"]] == [made]
    finally:
        with swarm.manager.client() as client:
            wait_until(lambda: not client.tasks(filters={"label": "kernel_id"}), 30)
            client.remove_network(made)


def test_a_kernel_goes_on_elsewhere_when_its_node_dies(kernel: Boxed, swarm: Swarm) -> None:
    worker = swarm.engines[1]
    with contextlib.ExitStack() as stack:
        with swarm.paused(swarm.manager):
            used = stack.enter_context(kernel())
        used.run("x = 1")
        began = time.monotonic()
        worker.power_off()
        try:
            wait_until(lambda: not used.alive, 60)
            assert time.monotonic() - began < 40  # the Swarm itself needs 11 to 15 s
            used.restart(now=True)
            assert "NameError" in used.run("x")
            assert "42" in used.run("6 * 7")
        finally:
            worker.up(images=False)
            swarm.wire(worker)


def test_a_manager_that_is_killed_ends_no_kernel(kernel: Boxed, swarm: Swarm) -> None:
    with contextlib.ExitStack() as stack:
        with swarm.paused(swarm.manager):
            used = stack.enter_context(kernel())
        used.run("x = 41")
        swarm.manager.kill_daemon()
        try:
            assert "42" in used.run("x + 1")
            assert used.alive
        finally:
            swarm.manager.start_daemon()
        wait_until(lambda: answers(swarm), 60, every=0.5)
        assert "42" in used.run("x + 1")
        used.restart()
        assert "NameError" in used.run("x")


def answers(swarm: Swarm) -> bool:
    """Whether the manager takes orders again."""
    with contextlib.suppress(APIError), swarm.manager.client() as client:
        return len(client.nodes()) == 2
    return False


def test_what_starts_that_broke_off_have_left_is_collected(kernel: Boxed, swarm: Swarm) -> None:
    labels = {"kernel_id": "5f1c9a52-0000-4000-8000-000000000009", "gp.user": "ada"}
    with kernel() as used, swarm.manager.client() as client:
        (service,) = client.services(filters={"label": "kernel_id"})
        ours = {**labels, "gp.installation": service["Spec"]["Labels"]["gp.installation"]}
        client.create_config("gp-left", b"x", labels=ours)
        client.create_secret("gp-left", b"x", labels=ours)
        client.create_secret("gp-of-others", b"x", labels={**labels, "gp.installation": "of-others"})
        assert main(["gc"]) == 0
        assert [one["Spec"]["Name"] for one in client.secrets() if "left" in one["Spec"]["Name"]] == []
        assert [one["Spec"]["Name"] for one in client.configs() if "left" in one["Spec"]["Name"]] == []
        client.remove_secret("gp-of-others")
        assert "42" in used.run("6 * 7")
