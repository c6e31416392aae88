"""What clients and a kernel may say to each other through the relay, and what it costs those in between."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq
from jupyter_client.blocking import BlockingKernelClient
from support.answering import SUPPORT, HostApplication
from support.installation import Installation, wait_until

from gp_launchers.streams import BASE, CHUNK, WINDOW

pytestmark = pytest.mark.relay

PAUSE = float(os.environ.get("GP_TEST_PAUSE", "15"))
STOPPED = 20.0
"""Seconds: longer than a launcher believes in a server that says nothing."""
MIB = 1024 * 1024
LARGEST = 256 * MIB
GROWTH = 12 * MIB
"""Bytes that server and launcher may grow by, whatever passes through; measured: 0.3 to 3 MiB."""
OWN = 2
"""Streams that the manager may have itself."""


class Host(HostApplication):
    """A host application in a process of its own, and one kernel of it.

    Args:
        installation: Whose kernelspecs it has.
        kernelspec: Of the kernel.
    """

    def __init__(self, installation: Installation, kernelspec: str) -> None:
        # not a server's, which subscribes to iopub itself, and then holds what it has not looked at
        super().__init__(installation, "AsyncMultiKernelManager", GP_CHANNELS="relay")
        self.kernel_id = str(uuid.uuid4())
        try:
            self.connection: dict[str, Any] = self.ask(f"start {self.kernel_id} {kernelspec}")["connection"]
            self.launcher: int = self.relay["launcher"]
        except BaseException:
            self.end()
            raise

    @property
    def relay(self) -> dict[str, Any]:
        """What it says of the kernel's channels."""
        return self.ask(f"relay {self.kernel_id}")

    def end(self) -> None:
        """Shut the kernel down, and end it."""
        self.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(Exception):
            assert self.ask(f"shutdown {self.kernel_id}") == {"done": True}
        super().end()

    # -- clients

    @contextmanager
    def socket(self, kind: int, channel: str, high_water_mark: int = 1000) -> Iterator[zmq.Socket[bytes]]:
        """A socket that is connected to a channel of the kernel."""
        with zmq.Context() as context, context.socket(kind) as made:
            made.linger = 0
            made.rcvhwm = made.sndhwm = high_water_mark
            made.rcvtimeo = made.sndtimeo = 90_000
            made.connect(f"tcp://127.0.0.1:{self.connection[f'{channel}_port']}")
            yield made

    @contextmanager
    def client(self) -> Iterator[BlockingKernelClient]:
        """A client of an ipykernel, with the four channels that a server opens for each notebook."""
        client = BlockingKernelClient()
        client.load_connection_info({**self.connection, "key": self.connection["key"].encode()})
        client.start_channels(hb=False)
        try:
            wait_until(lambda: answers(client), 60)
            yield client
        finally:
            client.stop_channels()


@pytest.fixture
def host(installation: Installation, ipykernel_spec: Path) -> Iterator[Callable[[str], Host]]:
    """Start a host application with a kernel: `py` (ipykernel) or `echo`."""
    config = {"launch_timeout": 45}
    echo = {"argv": [sys.executable, str(SUPPORT / "echo_kernel.py"), "{connection_file}"]}
    installation.jupyter.install_spec("py", ipykernel_spec, config=config)
    installation.jupyter.install_spec("echo", echo, config=config)
    started: list[Host] = []

    def start(kernelspec: str) -> Host:
        started.append(Host(installation, kernelspec))
        return started[-1]

    yield start
    for one in started:
        one.end()


def answers(client: BlockingKernelClient) -> bool:
    """Whether a kernel answers on shell and iopub: what it said before iopub knew of the client is lost."""
    request = client.kernel_info()
    with contextlib.suppress(Exception):
        while client.get_shell_msg(timeout=2)["parent_header"].get("msg_id") != request:
            pass
        while client.get_iopub_msg(timeout=0.3)["parent_header"].get("msg_id") != request:
            pass
        return True
    return False


def printed(client: BlockingKernelClient, request: str, timeout: float = 60) -> list[str]:
    """Wait for the end of a cell, on shell and iopub, and return what it printed."""
    seen: list[str] = []
    deadline = time.monotonic() + timeout
    while True:
        message = client.get_iopub_msg(timeout=max(0.1, deadline - time.monotonic()))
        if message["parent_header"].get("msg_id") == request:
            if message["content"].get("execution_state") == "idle":
                break
            if message["msg_type"] == "stream":
                seen.append(message["content"]["text"])
    while client.get_shell_msg(timeout=max(0.1, deadline - time.monotonic()))["parent_header"]["msg_id"] != request:
        pass
    return seen


def reply_is(client: BlockingKernelClient, request: str) -> bool:
    """Whether the next reply that comes is that of a request."""
    return bool(client.get_shell_msg(timeout=60)["parent_header"]["msg_id"] == request)


def after(client: BlockingKernelClient, iopub: zmq.Socket[bytes]) -> str:
    """What a cell prints that is run now."""
    request = client.execute("print(2 * 3)")
    while not reply_is(client, request):
        pass
    text = ""
    while iopub.poll(500):
        text += json.loads(iopub.recv_multipart()[-1]).get("text", "")
    return text


@dataclass
class Growth:
    """How many bytes a process grew by at most, while somebody looked.

    Args:
        process: Looked at.
        before: Its resident memory at first.
        most: The most that was seen.
    """

    process: psutil.Process
    before: int
    most: int

    @property
    def bytes(self) -> int:
        """The difference."""
        return self.most - self.before


@contextmanager
def watched(host: Host) -> Iterator[dict[str, Growth]]:
    """Look at the resident memory of server and launcher until the end of the block."""
    growth = {}
    for name, pid in (("server", host.process.pid), ("launcher", host.launcher)):
        process = psutil.Process(pid)
        resident = process.memory_info().rss
        growth[name] = Growth(process, resident, resident)
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            for one in growth.values():
                one.most = max(one.most, one.process.memory_info().rss)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield growth
    finally:
        over.set()
        looking.join()


def told(growth: dict[str, Growth], what: str) -> None:
    """Say what was measured, and demand that it is bounded."""
    print(f"{what}: " + ", ".join(f"{name} grew by {one.bytes / MIB:.1f} MiB" for name, one in growth.items()))
    for name, one in growth.items():
        assert one.bytes < GROWTH, f"{name} holds {one.bytes} bytes more"


# Messages


SIZES = [
    *(0, 1, 255, 256, BASE - 1, BASE, BASE + 1, CHUNK - 9, CHUNK, CHUNK + 1, WINDOW, WINDOW + 1),
    *(MIB + 1, 16 * MIB, 1, 0),
]


def test_messages_of_every_size_come_back_and_the_largest_fills_nothing(host: Callable[[str], Host]) -> None:
    one = host("echo")
    with one.socket(zmq.DEALER, "shell") as shell:
        for size in SIZES:
            sent = os.urandom(min(size, 1000)).ljust(size, b"x")
            shell.send_multipart([sent, b"", b"end"])
            assert shell.recv_multipart() == [sent, b"", b"end"], size
        with watched(one) as growth:
            began = time.monotonic()
            sent = os.urandom(1000).ljust(LARGEST, b"x")
            shell.send(sent)
            assert shell.recv() == sent
            took = time.monotonic() - began
        told(growth, f"{LARGEST // MIB} MiB there and back in {took:.1f} s")


def test_a_reader_that_pauses_gets_all_and_its_messages_wait_in_the_kernel(host: Callable[[str], Host]) -> None:
    one = host("echo")
    count, size = 256, MIB
    with one.socket(zmq.DEALER, "shell", high_water_mark=1) as slow, one.socket(zmq.DEALER, "control") as other:
        other.send(b"before")
        assert other.recv() == b"before"
        with watched(one) as growth:
            slow.send(b"many %d %d" % (count, size))
            slow.poll(30_000)
            pause = time.monotonic() + PAUSE
            turns = 0
            while time.monotonic() < pause:  # meanwhile another client is served
                other.send(b"meanwhile")
                assert other.recv() == b"meanwhile"
                turns += 1
                time.sleep(0.01)
            for number in range(count):
                got = slow.recv()
                assert (len(got), int.from_bytes(got[:8], "big")) == (size, number)
                if number % 16 == 0:
                    time.sleep(0.05)  # slow, not only late
        told(growth, f"{count} messages of 1 MiB, a pause of {PAUSE:g} s, {turns} requests of another client meanwhile")


def test_output_that_nobody_takes_waits_in_a_bounded_file_and_no_message_is_cut(host: Callable[[str], Host]) -> None:
    one = host("py")
    count, size = 256, MIB
    code = f"""
from IPython.display import display
for number in range({count}):
    display({{"text/plain": f"{{number:8d}}" + "x" * ({size} - 8)}}, raw=True)
"""
    with one.client() as client, one.socket(zmq.SUB, "iopub", high_water_mark=1) as slow:
        slow.subscribe(b"")
        while not slow.poll(100):
            client.kernel_info()  # until the kernel knows of the subscription
        client.iopub_channel.stop()
        with watched(one) as growth:
            request = client.execute(code)
            wait_until(lambda: reply_is(client, request), 60)
            numbers = []
            while slow.poll(3000):
                data = json.loads(slow.recv_multipart()[-1]).get("data")
                if data:
                    assert len(data["text/plain"]) == size
                    numbers.append(int(data["text/plain"][:8]))
        kept = len(numbers) * size / MIB
        told(growth, f"a subscriber that took nothing of {count} MiB until the end, and then {kept:.0f} MiB")
        assert numbers == sorted(set(numbers))
        assert 32 * MIB < len(numbers) * size < count * size, "the file's limit is 64 MiB"
        wait_until(lambda: "6\n" in after(client, slow), 20)


# Clients


def test_thirty_clients_of_one_kernel_get_their_own_replies_and_all_of_the_output(host: Callable[[str], Host]) -> None:
    one = host("py")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(one.client()) for _ in range(30)]
        assert one.relay["streams"] >= 4 * len(clients)
        requests = [client.execute(f"print({number})") for number, client in enumerate(clients)]
        for client, request in zip(clients, requests, strict=True):
            heard = dict.fromkeys(requests, "")
            while not all(text.endswith("\n") for text in heard.values()):  # each hears every cell
                message = client.get_iopub_msg(timeout=30)
                if message["msg_type"] == "stream" and message["parent_header"]["msg_id"] in requests:
                    heard[message["parent_header"]["msg_id"]] += message["content"]["text"]  # a print may be two
            assert heard == {request: f"{number}\n" for number, request in enumerate(requests)}
            assert client.get_shell_msg(timeout=30)["parent_header"]["msg_id"] == request
    wait_until(lambda: one.relay["streams"] <= OWN, 20)


def test_clients_that_come_and_go_leave_nothing(host: Callable[[str], Host]) -> None:
    one = host("py")
    with one.client() as staying:
        with watched(one) as growth:
            for turn in range(12):
                with one.client() as client:
                    request = client.execute(f"print({turn}, 'x' * 100_000)")
                    if turn % 3:  # else it leaves in the middle
                        assert "".join(printed(client, request)).startswith(f"{turn} x")
        request = staying.execute("print('still here')")
        assert printed(staying, request) == ["still here\n"]
        told(growth, "12 clients that came and went")
    wait_until(lambda: one.relay["streams"] <= OWN, 20)


# The server


def test_a_stopped_server_loses_nothing_of_what_a_cell_prints(host: Callable[[str], Host]) -> None:
    one = host("py")
    count = 3000
    code = f"import time\nfor n in range({count}):\n  print(n, flush=True)\n  time.sleep({(STOPPED + 2) / count})"
    with one.client() as client:
        assert one.relay["resumes"] == 0
        request = client.execute(code)
        wait_until(lambda: client.iopub_channel.msg_ready(), 20)
        one.process.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        time.sleep(STOPPED)
        one.process.send_signal(signal.SIGCONT)
        text = "".join(printed(client, request, 120))
        print(f"all was there {time.monotonic() - stopped - STOPPED:.1f} s after the end of {STOPPED:g} s")
        assert text.split() == [str(number) for number in range(count)]
        assert one.relay["resumes"] == 1
