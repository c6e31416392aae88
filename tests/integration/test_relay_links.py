"""Channels over a line that breaks: launcher and kernel are in another network, and all arrives once and in order."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from clusters.wan import Link
from clusters.wan.backend import PROVISIONER, Listener, config, offered
from jupyter_client.manager import KernelManager
from support.driven import Driven, driven
from support.installation import Installation, wait_until

from gp_core import kernel as kernel_module
from gp_core.relay import Relay

pytestmark = pytest.mark.relay

MESSAGES = 10_000
LAST_TENTH = MESSAGES // 10 * 9
SPEC = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]}

# Paced, so that most of it falls into the time of the breaks; the last tenth waits for their end.
CELL = """
import os, time
from IPython.display import display
for number in range({messages}):
    display({{"text/plain": f"{{number}} " + "x" * 1018}}, raw=True)
    time.sleep({pace})
    while number == {last_tenth} and not os.path.exists({done!r}):
        time.sleep(0.02)
"""


@dataclass
class Line:
    """A link, how it is, and what happens on it.

    Args:
        delay: Seconds that a round trip takes longer.
        loss: Share of the frames that get lost.
        resets: How often all connections are reset.
        blackouts: Seconds of each time without a line.
        moves: How often the far side gets another address.
        pace: Seconds between two messages of the kernel.
    """

    delay: float
    loss: float = 0.0
    resets: int = 0
    blackouts: tuple[float, ...] = ()
    moves: int = 0
    pace: float = 0.002

    def events(self, rng: random.Random) -> list[Callable[[Link], None]]:
        """What happens, in random order."""
        found: list[Callable[[Link], None]] = [Link.reset] * self.resets
        for seconds in self.blackouts:
            found.insert(rng.randrange(len(found) + 1), _dark_for(seconds))
        for _ in range(self.moves):
            found.insert(rng.randrange(len(found) // 2 + 1), _move)
        return found


def _dark_for(seconds: float) -> Callable[[Link], None]:
    def dark(link: Link) -> None:
        link.blackout(True)
        time.sleep(seconds)
        link.blackout(False)

    return dark


def _move(link: Link) -> None:
    link.move_far_end()


LINES = {
    "near-lossy": Line(0.0, loss=0.01, resets=100, blackouts=(2.0,)),
    "50ms": Line(0.05, resets=60, blackouts=(3.0, 1.0), pace=0.003),
    "50ms-lossy": Line(0.05, loss=0.01, resets=20),
    "250ms": Line(0.25, resets=18, blackouts=(2.0,), pace=0.003),
    "moved": Line(0.02, resets=4, moves=1, pace=0.001),
}
assert sum(line.resets for line in LINES.values()) >= 200


@pytest.fixture
def listener(installation: Installation, link: Link, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """A kernelspec `far`, whose kernels run behind the link, and what happens to them."""
    monkeypatch.setenv("GP_RESPONSE_IP", link.near)
    monkeypatch.setenv("GP_BIND_IP", link.near)
    with offered() as heard:
        installation.jupyter.install_spec("far", SPEC, provisioner=PROVISIONER, config=config(link))
        yield heard


@pytest.fixture
def far(listener: Listener) -> Iterator[Driven]:
    """A running ipykernel behind the link."""
    with driven(KernelManager(kernel_name="far")) as kernel:
        yield kernel


def remote(kernel: Driven) -> kernel_module.RemoteKernel:
    """The kernel as its server knows it."""
    provisioner: Any = kernel.manager.provisioner
    found: kernel_module.RemoteKernel = provisioner._kernel
    return found


def relay_of(kernel: Driven) -> Relay:
    """Its endpoints."""
    found = remote(kernel).relay
    assert found is not None
    return found


def break_it(link: Link, line: Line, kernel: Driven, rng: random.Random) -> None:
    """Let everything happen to the line that shall, each thing at a random moment of a connection's life."""
    relay, seen = relay_of(kernel), -1
    for happens in line.events(rng):
        if rng.random() < 0.8:  # else it may hit a connection that is only being made
            wait_until(lambda seen=seen: relay.resumes > seen and remote(kernel).session is not None, 60)
        time.sleep(rng.uniform(0, 0.2 + 8 * line.delay))
        seen = relay.resumes if happens in (Link.reset, _move) else -1  # TCP outlives a short blackout
        happens(link)


@pytest.mark.parametrize("name", LINES)
def test_every_message_arrives_once_and_in_order(
    link: Link, listener: Listener, far: Driven, tmp_path: Path, name: str
) -> None:
    line, seed = LINES[name], int(os.environ.get("GP_TEST_SEED") or random.randrange(1 << 32))
    print(f"GP_TEST_SEED={seed}")
    rng = random.Random(seed)
    done = tmp_path / "done"
    link.shape(delay=line.delay, loss=line.loss)
    broken: list[BaseException] = []

    def breaks() -> None:
        try:
            break_it(link, line, far, rng)
        except BaseException as error:  # told by the test's own thread
            broken.append(error)
        finally:
            link.blackout(False)
            done.touch()

    began = time.monotonic()
    breaking = threading.Thread(target=breaks)
    code = CELL.format(messages=MESSAGES, pace=line.pace, last_tenth=LAST_TENTH, done=str(done))
    request = far.client.execute(code)
    breaking.start()
    try:
        numbers = []
        seen_at_end = None
        while True:
            message = far.client.get_iopub_msg(timeout=90)
            if message["parent_header"].get("msg_id") != request:
                continue
            if message["msg_type"] == "display_data":
                numbers.append(int(message["content"]["data"]["text/plain"].split()[0]))
                if seen_at_end is None and done.exists():
                    seen_at_end = len(numbers)
            elif message["content"].get("execution_state") == "idle":
                break
        assert far.reply(request, 60)["status"] == "ok"
    finally:
        breaking.join(120)
    assert not broken, broken
    assert numbers == list(range(MESSAGES))
    assert far.run("6 * 7") == "42", "the line works"
    resumes = relay_of(far).resumes
    print(f"{name}: {time.monotonic() - began:.1f} s, {resumes} resumes, {seen_at_end} messages until the last break")
    # a reset while the line is dialled breaks no session, and two may hit one
    assert resumes >= line.resets // 2 + line.moves
    assert listener.count("resumed") == resumes
    assert 0 < listener.count("lost") <= resumes, "else it was back before the server knew"
    assert not listener.count("dropped")
    assert (listener.count("connected"), listener.count("listening")) == (1, 1), "it is the first launcher's session"
    if line.moves:
        assert remote(far).session is not None
        assert remote(far).session.address == link.far
