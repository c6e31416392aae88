"""The ground the other tests stand on: real kernels and clusters behave without gp as the tests assume."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from clusters.jupyter_env import JupyterEnv
from clusters.slurm import SlurmCluster
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.connect import write_connection_file
from jupyter_client.manager import KernelManager

_READY_TIMEOUT = 120.0


@contextmanager
def running(env: JupyterEnv, spec: Path) -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    """A kernel started by jupyter_client's own provisioner, ready for its first cell."""
    env.install_spec("plain", spec, provisioner=None)
    manager = KernelManager(kernel_name="plain")
    manager.start_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=_READY_TIMEOUT)
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def run_cell(client: BlockingKernelClient, code: str, timeout: float = 60) -> str:
    """Run a cell and return what it printed and its result.

    A kernel may throw away what comes right after an interrupted cell. IRkernel does, and tells so on the shell
    channel only, where `execute_interactive` does not look: the cell is sent again then.
    """
    deadline = time.monotonic() + timeout
    while True:
        message_id: str = client.execute(code)
        if reply_to(client, message_id, deadline - time.monotonic())["content"]["status"] != "aborted":
            break
    seen: list[str] = []
    while True:
        message = client.get_iopub_msg(timeout=max(0.1, deadline - time.monotonic()))
        content = message["content"]
        if message["parent_header"].get("msg_id") != message_id:
            continue
        if content.get("execution_state") == "idle":
            return "".join(seen)
        seen.append(content.get("text") or content.get("data", {}).get("text/plain", ""))


def start_endless(client: BlockingKernelClient, code: str) -> str:
    """Send a cell that does not end and return its message id once it runs."""
    # An error would make the kernel throw away the next cell, if that comes soon enough.
    message_id: str = client.execute(code, stop_on_error=False)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        message = client.get_iopub_msg(timeout=30)
        if message["parent_header"].get("msg_id") == message_id and message["msg_type"] == "execute_input":
            time.sleep(0.5)  # a kernel tells of the cell before it runs it
            return message_id
    raise TimeoutError("the cell did not start")


def reply_to(client: BlockingKernelClient, message_id: str, timeout: float = 20) -> dict[str, Any]:
    """The reply to a cell, whatever its status."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            reply: dict[str, Any] = client.get_shell_msg(timeout=max(0.1, deadline - time.monotonic()))
        except queue.Empty:
            break
        if reply["parent_header"].get("msg_id") == message_id:
            return reply
    raise TimeoutError(f"no reply within {timeout:g} s")


@pytest.mark.parametrize(
    ("fixture", "mode", "endless"),
    [
        ("ipykernel_spec", "signal", "while True: pass"),
        ("irkernel_spec", "signal", "repeat {}"),
        ("jjava_spec", "message", "while (true) Thread.sleep(10);"),
    ],
)
def test_kernel_takes_an_interrupt(
    request: pytest.FixtureRequest, jupyter_env: JupyterEnv, fixture: str, mode: str, endless: str
) -> None:
    with running(jupyter_env, request.getfixturevalue(fixture)) as (manager, client):
        assert manager.kernel_spec is not None
        assert manager.kernel_spec.interrupt_mode == mode
        assert "42" in run_cell(client, "6*7")
        cell = start_endless(client, endless)
        manager.interrupt_kernel()
        reply_to(client, cell)
        assert "42" in run_cell(client, "6*7")


def test_xeus_python_dies_of_an_interrupt(xeus_python_spec: Path, jupyter_env: JupyterEnv) -> None:
    with running(jupyter_env, xeus_python_spec) as (manager, client):
        assert "42" in run_cell(client, "6*7")
        start_endless(client, "import time; time.sleep(60)")
        manager.interrupt_kernel()
        deadline = time.monotonic() + 10
        while manager.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not manager.is_alive()


@contextmanager
def slurm_kernel(slurm: SlurmCluster) -> Iterator[tuple[str, BlockingKernelClient]]:
    """An ipykernel in a batch job, without any provisioner, ready for its first cell."""
    with tempfile.TemporaryDirectory(prefix="gp-job-") as folder:
        connection_file = f"{folder}/kernel.json"
        write_connection_file(connection_file)
        kernel = f"exec {sys.executable} -m ipykernel_launcher -f {connection_file}"
        submitted = slurm.run("sbatch", "--parsable", f"--output={folder}/log", f"--wrap={kernel}")
        job = submitted.strip().partition(";")[0]
        client = BlockingKernelClient()
        client.load_connection_file(connection_file)
        client.start_channels()
        try:
            wait_for_ready(client, _READY_TIMEOUT)
            yield job, client
        finally:
            client.stop_channels()
            slurm.run("scancel", job)


def wait_for_ready(client: BlockingKernelClient, timeout: float) -> None:
    """`wait_for_ready` for a client without a manager, which calls a kernel dead after a silent second."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            client.wait_for_ready(timeout=timeout)
            return
        except RuntimeError:
            if time.monotonic() > deadline:
                raise


def test_slurm_runs_interrupts_and_ends_a_kernel(slurm: SlurmCluster, jupyter_env: JupyterEnv) -> None:
    with slurm_kernel(slurm) as (job, client):
        node = run_cell(client, "import socket; print(socket.gethostname())").strip()
        assert node in slurm.node_names
        assert slurm.address_of(node)
        cell = start_endless(client, "while True: pass")
        slurm.run("scancel", "--full", "--signal=INT", job)
        assert reply_to(client, cell)["content"]["ename"] == "KeyboardInterrupt"
        slurm.run("scancel", job)
        deadline = time.monotonic() + 20
        while job in slurm.jobs() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert job not in slurm.jobs()


def test_slurm_controller_restarts_with_its_jobs(slurm: SlurmCluster) -> None:
    if not slurm.owned:
        pytest.skip("slurm: not with a cluster that others use")
    job = slurm.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 300").strip()
    try:
        slurm.stop_controller()
        slurm.start_controller()
        assert job in slurm.jobs()
    finally:
        slurm.run("scancel", job)
        slurm.wait_for_nodes()


_OWNER = """
import time
from clusters.slurm import SlurmCluster

cluster = SlurmCluster()
cluster.up()
cluster.run("sbatch", "--output=/dev/null", "--wrap=setsid sleep 4321")
print(cluster.config, flush=True)
time.sleep(60)
"""


def test_slurm_is_gone_when_its_owner_is_killed(slurm: SlurmCluster) -> None:
    if not slurm.owned:
        pytest.skip("slurm: the daemons need not be here where a cluster is given")
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert owner.stdout is not None
    with owner.stdout:
        folder = Path(owner.stdout.readline().strip()).parent
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + 10
    while _processes_naming(str(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _processes_naming(str(folder)) == []
    with SlurmCluster() as cluster:
        assert cluster.config.parent != folder
        assert not folder.exists(), "the next start sweeps what a killed one left"


def _processes_naming(text: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if text.encode() in line:
                found.append(entry.name)
    return found
