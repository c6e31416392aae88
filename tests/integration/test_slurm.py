"""gp-slurm, a third party's backend, on a real Slurm: the contract, and an ipykernel through jupyter_client."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from clusters.slurm import SlurmCluster
from jupyter_client.manager import KernelManager
from support.driven import Driven, driven
from support.installation import Installation, wait_until

from gp_core.errors import LaunchFailed
from gp_core.testing import BackendContract

gp_slurm = pytest.importorskip("gp_slurm", reason="slurm: needs pip install ./examples/gp-slurm")

pytestmark = pytest.mark.timeout(300)

ENDLESS = "print('running', flush=True)\nwhile True: pass"


# -- the contract


class TestContract(BackendContract):
    """On a cluster of our own, whose controller can be stopped."""

    backend_class = gp_slurm.SlurmBackend
    unknown_job: ClassVar = {"job_id": "99999999"}
    settle = 0.5

    @pytest.fixture(autouse=True)
    def cluster(self, slurm: SlurmCluster) -> Iterator[SlurmCluster]:
        """The cluster, idle before and after the test."""
        before = slurm.jobs()
        yield slurm
        wait_until(lambda: set(slurm.jobs()) <= set(before), 30, every=0.1)

    @pytest.fixture
    def backend_options(self) -> dict[str, Any]:
        return {"python": sys.executable}

    @pytest.fixture
    def break_platform(self, slurm: SlurmCluster) -> Callable[[], AbstractContextManager[object]]:
        @contextlib.contextmanager
        def controller_down() -> Iterator[None]:
            slurm.stop_controller()
            try:
                yield
            finally:
                slurm.start_controller()
                slurm.wait_for_nodes(("idle", "mixed", "allocated", "completing"))

        if not slurm.owned:
            pytest.skip("slurm: nobody stops the controller of a cluster that others use")
        return controller_down


# -- a real kernel


@pytest.fixture
def spec(slurm: SlurmCluster, installation: Installation, ipykernel_spec: Path) -> Iterator[str]:
    """Name of a kernelspec of ipykernel with only the one stanza; at the end the queue must be as before."""
    before = slurm.jobs()
    install(installation, ipykernel_spec, "batch")
    yield "batch"
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: set(slurm.jobs()) <= set(before), 15, every=0.1)
    assert set(slurm.jobs()) <= set(before), "jobs are left in the queue"


def install(installation: Installation, kernelspec: Path, name: str, **config: Any) -> str:
    """Install a kernelspec of ipykernel that Slurm runs."""
    options = {"python": sys.executable, "launch_timeout": 120, **config}
    installation.jupyter.install_spec(name, kernelspec, "slurm-provisioner", options)
    return name


@contextlib.contextmanager
def kernel_of(name: str) -> Iterator[Driven]:
    """A kernel that is ready for cells."""
    with driven(KernelManager(kernel_name=name)) as kernel:
        yield kernel


def test_life(slurm: SlurmCluster, spec: str) -> None:
    with kernel_of(spec) as kernel:
        node = kernel.run("import socket; print(socket.gethostname())").strip()
        assert node in slurm.node_names
        job = kernel.run("import os; print(os.environ['SLURM_JOB_ID'])").strip()
        assert job in slurm.jobs()
        assert kernel.manager.ip == slurm.address_of(node)

        cell = kernel.start_cell(ENDLESS, "running")
        started = time.monotonic()
        kernel.manager.interrupt_kernel()
        assert kernel.reply(cell)["ename"] == "KeyboardInterrupt"
        assert time.monotonic() - started < 2

        info = kernel.manager.get_connection_info()
        first = kernel.run("import os; print(os.getpid())")
        for now in (False, True):
            kernel.restart(now=now)
            assert kernel.run("import os; print(os.getpid())") != first
            assert kernel.run("left = globals().get('left', 'nothing'); print(left)").strip() == "nothing"
            assert kernel.run("import os; print(os.environ['SLURM_JOB_ID'])").strip() == job, "restarted in its job"
        assert kernel.manager.get_connection_info() == info

        kernel.manager.shutdown_kernel()
        wait_until(lambda: job not in slurm.jobs(), 15, every=0.1)


def test_environment_is_the_nodes_and_what_was_asked_for(
    slurm: SlurmCluster, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_THE_SERVER", "secret")
    manager = KernelManager(kernel_name=spec)
    with driven(manager, env={**os.environ, "OF_THE_CALLER": "it's $HOME"}) as kernel:
        seen = kernel.run("import os; print(sorted(set(os.environ) & {'OF_THE_SERVER', 'GP_LAUNCH_SECRETS'}))")
        assert seen.strip() == "[]"
        assert kernel.run("print(os.environ['OF_THE_CALLER'])").strip() == "it's $HOME"
        assert kernel.run("print('SLURM_EXPORT_ENV' in os.environ)").strip() == "False", "srun would pass nothing on"


def test_kernels_are_on_both_nodes(slurm: SlurmCluster, spec: str) -> None:
    with contextlib.ExitStack() as stack:
        kernels = [stack.enter_context(kernel_of(spec)) for _ in range(3)]
        nodes = {kernel.run("import socket; print(socket.gethostname())").strip() for kernel in kernels}
    assert nodes == set(slurm.node_names)


def test_cancelled_job_is_a_dead_kernel_with_a_reason(
    slurm: SlurmCluster, spec: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with kernel_of(spec) as kernel:
        job = kernel.run("import os; print(os.environ['SLURM_JOB_ID'])").strip()
        slurm.run("scancel", job)
        started = time.monotonic()
        wait_until(lambda: not kernel.alive, 20)
        assert time.monotonic() - started < 10
        wait_until(lambda: "CANCELLED" in caplog.text, 10)


def test_lost_node_is_a_dead_kernel_with_a_reason(
    slurm: SlurmCluster, spec: str, caplog: pytest.LogCaptureFixture
) -> None:
    if not slurm.owned:
        pytest.skip("slurm: nobody switches off the nodes of a cluster that others use")
    caplog.set_level(logging.INFO)
    with kernel_of(spec) as kernel:
        node = kernel.run("import socket; print(socket.gethostname())").strip()
        slurm.power_off(node)
        try:
            wait_until(lambda: not kernel.alive, 60)  # as soon as Slurm itself gives the node up
            wait_until(lambda: "NODE_FAIL" in caplog.text, 10)
        finally:
            slurm.power_on(node)
            slurm.wait_for_nodes()


def test_controller_that_is_down_ends_no_kernel(slurm: SlurmCluster, spec: str) -> None:
    if not slurm.owned:
        pytest.skip("slurm: nobody stops the controller of a cluster that others use")
    with kernel_of(spec) as kernel:
        slurm.stop_controller()
        try:
            cell = kernel.start_cell(ENDLESS, "running")
            kernel.manager.interrupt_kernel()
            assert kernel.reply(cell)["ename"] == "KeyboardInterrupt"
            assert kernel.alive
        finally:
            slurm.start_controller()
            slurm.wait_for_nodes(("idle", "mixed"))
        assert kernel.run("6*7") == "42"


def test_refused_job_is_told(slurm: SlurmCluster, spec: str, installation: Installation, ipykernel_spec: Path) -> None:
    name = install(installation, ipykernel_spec, "wrong", partition="no-such-partition")
    with pytest.raises(LaunchFailed, match=r"(?s)SlurmRefused.*[Ii]nvalid partition") as caught:
        KernelManager(kernel_name=name).start_kernel()
    assert "sinfo" in str(caught.value), "what to do about it"


def test_job_that_waits_for_ever_is_told(
    slurm: SlurmCluster, spec: str, installation: Installation, ipykernel_spec: Path
) -> None:
    name = install(installation, ipykernel_spec, "held", sbatch_options=["--hold"], launch_timeout=3)
    with pytest.raises(LaunchFailed, match=r"SlurmQueued") as caught:
        KernelManager(kernel_name=name).start_kernel()
    assert "JobHeldUser" in str(caught.value)


def test_broken_kernel_is_told(
    slurm: SlurmCluster, spec: str, installation: Installation, ipykernel_spec: Path
) -> None:
    broken = {"argv": [sys.executable, "-m", "no_such_kernel", "{connection_file}"], "language": "python"}
    options = {"python": sys.executable, "launch_timeout": 120}
    installation.jupyter.install_spec("broken", broken, "slurm-provisioner", options)
    with pytest.raises(LaunchFailed, match=r"No module named no_such_kernel"):
        KernelManager(kernel_name="broken").start_kernel()
