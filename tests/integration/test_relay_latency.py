"""What is urgent overtakes what is large: heartbeat, control and interrupt while a cell pours out half a gigabyte."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import zmq
from clusters.availability import offer
from clusters.wan import Link
from clusters.wan.backend import PROVISIONER, config, offered
from jupyter_client.manager import KernelManager
from support.driven import Driven, driven
from support.installation import Installation

pytestmark = pytest.mark.relay

SPEC = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
OUTPUT = 500
"""Messages of a megabyte."""
CELL = f"""
from IPython.display import display
for number in range({OUTPUT}):
    display({{"text/plain": "x" * 1_000_000}}, raw=True)
"""
ENDLESS = """
from IPython.display import display
while True:
    display({"text/plain": "x" * 1_000_000}, raw=True)
"""
# A process of its own: what it costs to take all that must not delay who measures.
READER = """
import sys, time, zmq
iopub = zmq.Context().socket(zmq.SUB)
iopub.subscribe(b"")
iopub.connect(f"tcp://127.0.0.1:{sys.argv[1]}")
size, last = 0, time.monotonic() + 60
while time.monotonic() < last:
    if iopub.poll(100):
        came = sum(len(part) for part in iopub.recv_multipart(copy=False))
        if came > 100_000:  # not the word that a request on control begins
            if not size:
                print("flows", flush=True)
            size, last = size + came, time.monotonic() + 1.5
print(size, flush=True)
"""
SLOWEST = 1.0
"""Seconds of an answer's median that are a defect on any machine; measured: see the output of the tests."""


@pytest.fixture(params=["loopback", "100-mbit-20-ms"])
def kernel(
    installation: Installation, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Driven]:
    """A relayed ipykernel, on this machine or far away."""
    with contextlib.ExitStack() as stack:
        if request.param == "loopback":
            installation.jupyter.install_spec("py", SPEC, config={"channels": "relay", "launch_timeout": 60})
        else:
            link = Link()
            stack.callback(link.down)
            offer("wan", link.up)
            link.shape(rate=100e6 / 8, delay=0.02)
            monkeypatch.setenv("GP_RESPONSE_IP", link.near)
            monkeypatch.setenv("GP_BIND_IP", link.near)
            stack.enter_context(offered())
            installation.jupyter.install_spec("py", SPEC, provisioner=PROVISIONER, config=config(link))
        yield stack.enter_context(driven(KernelManager(kernel_name="py")))


@contextmanager
def reader(kernel: Driven) -> Iterator[subprocess.Popen[str]]:
    """A client that takes all output as fast as it can."""
    port = str(kernel.manager.iopub_port)
    with subprocess.Popen([sys.executable, "-c", READER, port], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


class Probe:
    """Round trips of the heartbeat and of a request on control."""

    def __init__(self, kernel: Driven, heart: zmq.Socket[bytes]) -> None:
        self._client = kernel.client
        self._heart = heart

    def heartbeat(self) -> float:
        """Seconds of one."""
        began = time.monotonic()
        self._heart.send(b"ping")
        assert self._heart.poll(20_000), "the heart does not beat"
        assert self._heart.recv() == b"ping"
        return time.monotonic() - began

    def control(self) -> float:
        """Seconds of one."""
        began = time.monotonic()
        request = self._client.session.msg("kernel_info_request")
        self._client.control_channel.send(request)
        while True:
            reply = self._client.get_control_msg(timeout=20)
            if reply["parent_header"]["msg_id"] == request["header"]["msg_id"]:
                return time.monotonic() - began


@pytest.fixture
def probe(kernel: Driven) -> Iterator[Probe]:
    """Measures a kernel."""
    kernel.client.iopub_channel.stop()  # the reader takes it
    with zmq.Context() as context, context.socket(zmq.REQ) as heart:
        heart.linger = 0
        heart.connect(f"tcp://127.0.0.1:{kernel.manager.hb_port}")
        yield Probe(kernel, heart)


def shown(name: str, idle: list[float], busy: list[float]) -> str:
    """What was measured, in milliseconds."""

    def ms(values: list[float]) -> str:
        ordered = sorted(values)
        late = ordered[int(len(ordered) * 0.95)]
        return f"median {1e3 * statistics.median(values):.1f}, 95% {1e3 * late:.1f}, most {1e3 * ordered[-1]:.1f}"

    return f"{name}: idle {ms(idle)}; busy {ms(busy)} ms ({len(busy)} samples)"


def test_heartbeat_and_control_overtake_half_a_gigabyte(kernel: Driven, probe: Probe) -> None:
    measures = {"heartbeat": probe.heartbeat, "control": probe.control}
    idle = {name: [measure() for _ in range(40)] for name, measure in measures.items()}
    busy: dict[str, list[float]] = {name: [] for name in measures}
    with reader(kernel) as taking:
        assert taking.stdout is not None
        began = time.monotonic()
        time.sleep(0.5)  # until the subscription is there; what is said before is nobody's
        kernel.client.execute(CELL)
        assert taking.stdout.readline() == "flows\n"
        while taking.poll() is None:
            for name, measure in measures.items():
                busy[name].append(measure())
            time.sleep(0.01)
        size = int(taking.stdout.readline())
    print(f"{size / 1e6:.0f} MB of {OUTPUT} arrived in {time.monotonic() - began - 1.5:.1f} s")
    for name in measures:
        print(shown(name, idle[name], busy[name]))
        assert statistics.median(busy[name]) < SLOWEST
    assert size > 50e6


def test_an_interrupt_overtakes_endless_output(kernel: Driven, probe: Probe) -> None:
    with reader(kernel) as taking:
        assert taking.stdout is not None
        time.sleep(0.5)
        request = kernel.client.execute(ENDLESS)
        assert taking.stdout.readline() == "flows\n"
        time.sleep(1)
        began = time.monotonic()
        kernel.manager.interrupt_kernel()
        reply = kernel.reply(request, 30)
        print(f"interrupted after {1e3 * (time.monotonic() - began):.0f} ms")
    assert reply["ename"] == "KeyboardInterrupt"
