"""JupyterLab in a browser, with its kernels in its own server or behind a gateway: what an analyst sees."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from clusters.availability import offer
from clusters.docker import IMAGE, Engine
from clusters.hosts import HOME, Host, SshHosts
from support.installation import Installation, wait_until
from support.line import Line
from support.servers import Server, jupyter_lab, lab_behind_gateway

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from support.labpage import LabPage

pytestmark = [pytest.mark.timeout(180), pytest.mark.relay]

REMOTE = "Python on the cluster"
PID = "import os\nprint(os.getpid(), end='')"
LAUNCHER = "import os\nprint(os.getppid(), end='')"
ENDLESS = "print('running', flush=True)\nwhile True: pass"

AFTER_DEATH = ("idle", "starting", "unknown")
"""Statuses of a kernel that was restarted by itself: the page learns of no other one before the next cell is run.

It does not count answers to its own questions, and a kernel's first word comes before anybody listens, or just after.
"""

CUT = 20.0
"""Seconds: more than the silence after which either end gives the connection up."""
LINES = 300
PRINTS = f"import time\nfor number in range({LINES}): print('line', number, flush=True); time.sleep(0.1)"

NO_IPYKERNEL = [sys.executable, "-I", "-S", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
CANNOT_START = {
    "No ipykernel": (NO_IPYKERNEL, ["(no-ipykernel) ended with exit code 1", "[KernelDied]", "No module named"]),
    "No command": (
        ["gp-no-such-command", "{connection_file}"],
        ["(no-command)", "gp-no-such-command", "[CommandNotFound]"],
    ),
}
"""By the name that is shown: argv, and what the user must see."""


@dataclass
class Lab:
    """JupyterLab in a browser.

    Args:
        page: With the launcher.
        line: Between the kernels' launchers and the server that has the kernels.
    """

    page: LabPage
    line: Line


RUN = {"local": jupyter_lab, "gateway": lab_behind_gateway}


@pytest.fixture(params=RUN)
def lab(
    request: pytest.FixtureRequest, browser: Browser, installation: Installation, ipykernel_spec: Path, artifacts: Path
) -> Iterator[Lab]:
    """JupyterLab whose kernels are children of its server, or of a gateway that it is told of."""
    ipykernel = json.loads((ipykernel_spec / "kernel.json").read_text())["argv"]
    for name, argv in {REMOTE: ipykernel, **{name: argv for name, (argv, _) in CANNOT_START.items()}}.items():
        spec = {"argv": argv, "display_name": name}
        installation.jupyter.install_spec(name.lower().replace(" ", "-"), spec)
    with (
        Line().opened() as line,
        RUN[request.param](installation, env=line.env) as server,
        shown(browser, server, artifacts / "jupyterlab" / request.node.name) as page,
    ):
        yield Lab(page, line)


@contextmanager
def shown(browser: Browser, server: Server, shots: Path) -> Iterator[LabPage]:
    """Show JupyterLab's page, and keep screenshots in a folder."""
    from support.labpage import LabPage

    shutil.rmtree(shots, ignore_errors=True)
    shots.mkdir(parents=True)
    context = browser.new_context(viewport={"width": 1280, "height": 800}, locale="en-US")
    page = LabPage(context.new_page(), shots)
    try:
        page.open(server.url, server.token)
        yield page
    finally:
        page.keep("end")
        context.close()


def test_a_cell_interrupt_restart_and_death(lab: Lab) -> None:
    page = lab.page
    page.keep("launcher")
    page.new_notebook(REMOTE)
    assert page.kernel_name == REMOTE
    assert page.run("6*7") == "42"
    assert page.run("x = 41; x + 1") == "42"
    pid, launcher = page.run(PID), page.run(LAUNCHER)
    page.keep("result")

    cell = page.start(ENDLESS)
    page.wait_for_output(cell, "running")
    page.wait_for_kernel("busy")
    page.keep("endless")
    page.interrupt()
    page.wait_for_end(cell)
    assert "KeyboardInterrupt" in page.output(cell)
    page.wait_for_kernel()
    page.keep("interrupted")
    assert page.run("x") == "41"

    page.restart()
    assert "NameError" in page.run("x")
    second = page.run(PID)
    assert second != pid
    assert page.run(LAUNCHER) == launcher, "a restart is in place"
    page.keep("restarted")

    os.kill(int(second), signal.SIGKILL)
    shown = page.dialog()
    page.keep("killed")
    assert "appears to have died. It will restart automatically." in shown
    page.accept()
    page.wait_for_kernel(*AFTER_DEATH)
    third = page.run(PID)
    assert third not in (pid, second)
    page.keep("restarted-by-itself")


def test_every_line_of_a_cell_comes_through_a_cut_of_the_link(lab: Lab) -> None:
    page = lab.page
    page.new_notebook(REMOTE)
    pid, kernel_id = page.run(PID), page.state["id"]
    cell = page.start(PRINTS)
    page.wait_for_output(cell, "line 19")
    lab.line.cut()
    page.wait(1)
    seen = page.output(cell)
    page.keep("cut")
    page.wait(CUT - 2)
    assert page.output(cell) == seen, "nothing comes while the link is cut"
    page.keep("still-cut")
    page.wait(1)
    lab.line.mend()
    page.wait_for_end(cell)
    page.keep("mended")
    assert page.output(cell).splitlines() == [f"line {number}" for number in range(LINES)]
    assert page.dialogs.count() == 0
    page.wait_for_kernel()
    assert (page.run(PID), page.state["id"]) == (pid, kernel_id)


def test_the_reason_of_a_failed_start_is_shown(lab: Lab) -> None:
    page = lab.page
    for number, (name, (_, parts)) in enumerate(CANNOT_START.items()):
        if number == 0:
            page.click_card(name)
        else:
            page.choose_kernel(name)  # the page asks for another one by itself, once
        shown = page.dialog()
        page.keep(name.lower().replace(" ", "-"))
        missing = [part for part in parts if part not in shown]
        assert not missing, shown
        page.accept()
    page.change_kernel(REMOTE)
    assert page.run("6*7") == "42"


# -- kernels on a host


@pytest.fixture
def host(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A host with an environment called science, which nobody has looked at; it cannot dial this machine."""
    hosts = SshHosts("")
    try:
        offer("ssh", hosts.up)
        hosts["h1"].inside("ln", "-s", sys.prefix, f"{HOME}/science")
        monkeypatch.setenv("GP_SSH_CONFIG", str(hosts.config))
        monkeypatch.setenv("GP_RESPONSE_IP", "192.0.2.1")
        yield hosts["h1"]
    finally:
        hosts.down()


def test_a_kernel_that_was_discovered_on_a_host(
    browser: Browser, installation: Installation, host: Host, artifacts: Path
) -> None:
    command = (sys.executable, "-m", "jupyter", "gp", "install", "ssh", "--host", "h1", "--discover", "h1-science")
    subprocess.run(command, check=True)
    with jupyter_lab(installation) as server, shown(browser, server, artifacts / "jupyterlab/discovered") as page:
        page.keep("launcher")
        page.new_notebook(f"Python {sys.version_info[0]}.{sys.version_info[1]} (science) @ h1")
        assert page.run("import os; print(os.uname().nodename, os.environ['VIRTUAL_ENV'])") == f"h1 {HOME}/science"
        cell = page.start(ENDLESS)
        page.wait_for_output(cell, "running")
        page.interrupt()
        page.wait_for_end(cell)
        page.restart()
        assert page.run("6*7") == "42"
        page.keep("result")
    wait_until(lambda: not host.processes(), 20)


# -- kernels in containers


def test_a_notebook_in_a_container_of_an_image_that_knows_nothing_of_gp(
    browser: Browser, installation: Installation, engine: Engine, artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", engine.url)
    install = (sys.executable, "-m", "jupyter", "gp", "install", "docker", "--image", IMAGE, "--discover", "*")
    subprocess.run((*install, "--set", "memory=512Mi"), check=True)
    with jupyter_lab(installation) as server, shown(browser, server, artifacts / "jupyterlab" / "container") as page:
        page.keep("launcher")
        page.new_notebook(f"Python 3.{sys.version_info[1]} (local) @ {IMAGE}")
        assert page.run("6*7") == "42"
        assert page.run("import os; os.path.exists('/.gp')") == "True"
        page.keep("result")
        cell = page.start(ENDLESS)
        page.wait_for_output(cell, "running")
        page.interrupt()
        page.wait_for_end(cell)
        assert "KeyboardInterrupt" in page.output(cell)
        assert page.run("x = 41; x + 1") == "42"
        page.restart()
        assert "NameError" in page.run("x")
        with engine.client() as client:
            (found,) = client.containers(filters={"label": "kernel_id"})
            client.kill(found["Id"])
        shown_text = page.dialog()
        page.keep("killed")
        assert "appears to have died. It will restart automatically." in shown_text
        page.accept()
        page.wait_for_kernel(*AFTER_DEATH)
        assert page.run("6*7") == "42"
        page.keep("restarted-by-itself")
    assert engine.counts()["containers"] == 0
