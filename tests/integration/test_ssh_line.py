"""gp-ssh over a long and bad line: a round trip of 200 ms, of which one frame in a hundred gets lost."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters.availability import offer
from clusters.sshd import Sshd
from clusters.wan import Link
from jupyter_client.manager import KernelManager
from support.driven import driven
from support.installation import Installation

pytestmark = [pytest.mark.timeout(300), pytest.mark.relay]

COUNT = "import time\nfor n in range(300):\n    print(n, flush=True)\n    time.sleep(0.01)"


@pytest.fixture
def sshd(link: Link) -> Iterator[Sshd]:
    """An sshd at the far end."""
    made = Sshd(link)
    try:
        offer("ssh", made.up)
        link.shape(delay=0.2, loss=0.01)
        yield made
    finally:
        made.down()


@pytest.mark.parametrize("callback", ["dial", "ssh"])
def test_a_life(
    installation: Installation,
    link: Link,
    sshd: Sshd,
    ipykernel_spec: Path,
    monkeypatch: pytest.MonkeyPatch,
    callback: str,
) -> None:
    monkeypatch.setenv("GP_SSH_CONFIG", str(sshd.config))
    monkeypatch.setenv("GP_RESPONSE_IP", link.near)
    spec = json.loads((ipykernel_spec / "kernel.json").read_text())
    spec["argv"][0] = sys.executable
    config = {"remote_hosts": ["h1"], "callback": callback, "launch_timeout": 60}
    installation.jupyter.install_spec("far", spec, provisioner="distributed-provisioner", config=config)
    with driven(KernelManager(kernel_name="far")) as kernel:
        cell = kernel.start_cell(COUNT, "0")
        assert kernel.output(cell, 90).split() == [str(n) for n in range(1, 300)]
        cell = kernel.start_cell("x = 1; print('running', flush=True)\nwhile True: pass", "running")
        kernel.manager.interrupt_kernel()
        assert kernel.reply(cell)["ename"] == "KeyboardInterrupt"
        kernel.restart()
        assert "NameError" in kernel.run("x")
        kernel.shutdown()
