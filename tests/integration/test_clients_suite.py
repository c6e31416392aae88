"""jupyter_client's own tests, with its local provisioner and with ours: what passes there passes here.

The suite comes from the sdist of the jupyter_client that is installed, and runs in an environment of its own: its
plugins would change how the other tests here run. Left out are the files that start no kernel, which cannot tell the
provisioners apart: adapter, connect, jsonutil, kernelspec, kernelspecapp, localinterfaces, public_api, session, ssh.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest
from clusters.availability import Unavailable, offer
from clusters.jupyter_env import JupyterEnv
from clusters.kernels.cache import cached
from support.installation import Installation

pytestmark = pytest.mark.timeout(1200)  # it builds an environment the first time

PACKAGES = Path(__file__).parents[2] / "packages"
TOOLS = ("anyio==4.16.0", "msgpack==1.2.4", "pytest==9.2.0", "pytest-jupyter==0.11.0", "pytest-timeout==2.4.0")
"""What the suite's `test` extra asks for, without coverage, mypy and pre-commit, which no test uses."""

SHARDS = (
    ("test_client", "test_restarter", "test_consoleapp", "test_runapp"),
    ("test_kernelmanager", "test_manager", "test_kernelapp"),
    ("test_multikernelmanager", "test_provisioning", "test_transport_security"),
)
"""Files that run one after the other; the tests mostly wait, so the shards run at the same time."""

IS_LOCAL = "asserts isinstance(provisioner, LocalProvisioner)"
NOT_FOUND = "expects Popen's FileNotFoundError; ours is LaunchFailed [CommandNotFound], as from any other machine"
DIES_EARLY = "expects start_kernel to return although the kernel dies before it listens; ours raises LaunchFailed"
BEFORE_LAUNCH = (
    "uses the ports or the connection file after pre_start_kernel; the launcher chooses ports, at the launch"
)

EXPECTED = {
    "test_multikernelmanager.TestAsyncKernelManager::test_bad_kernelspec": NOT_FOUND,
    "test_multikernelmanager.TestAsyncKernelManager::test_bad_kernelspec_pending": NOT_FOUND,
    "test_provisioning.TestRuntime::test_existing[no_provisioner]": IS_LOCAL,
    "test_provisioning.TestRuntime::test_local_provisioner_pre_launch_generates_curve_keys_over_ipc": IS_LOCAL,
    "test_provisioning.TestRuntime::test_local_provisioner_pre_launch_generates_curve_keys_under_transport_encryption": IS_LOCAL,  # noqa: E501
    "test_restarter::test_async_restarter_gives_up[ipc]": DIES_EARLY,
    "test_restarter::test_async_restarter_gives_up[tcp]": DIES_EARLY,
    "test_restarter::test_restarter_gives_up[ipc]": DIES_EARLY,
    "test_restarter::test_restarter_gives_up[tcp]": DIES_EARLY,
    "test_transport_security::test_curve_keys_reused_across_restart": BEFORE_LAUNCH,
    "test_transport_security::test_iopub_plaintext_visibility_depends_on_curve[disabled]": BEFORE_LAUNCH,
}
"""Tests that pass with the local provisioner and cannot with ours, and why."""


@dataclass(frozen=True)
class Suite:
    """The suite and the interpreter that runs it.

    Args:
        folder: Holds `tests` and the suite's pytest settings.
        python: Has jupyter_client, gp and what the suite needs.
        home: Of the runs.
    """

    folder: Path
    python: Path
    home: Path

    def run(self, label: str, provisioner: str, tests: Iterable[str]) -> dict[str, str]:
        """Run tests and return what came of each: "passed", "skipped", or what went wrong.

        Args:
            label: For the files of this run.
            provisioner: Starts every kernel whose kernelspec names none.
            tests: Files, or ids as pytest takes them.
        """
        scratch = self.home / label
        scratch.mkdir(mode=0o700)
        own = {
            "ASYNC_TEST_TIMEOUT": "60",  # six starts in five seconds are too much for a busy machine
            "GP_DATA_DIR": str(scratch / "gp"),
            "GP_RESPONSE_PORT": "0",
            "GP_RUNTIME_DIR": str(scratch / "launchers"),
            "HOME": str(scratch),
            "JUPYTER_DEFAULT_PROVISIONER_NAME": provisioner,
            # "python3" is the kernelspec of the suite's interpreter, and "jupyter" the command beside it
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}",
        }
        report = scratch / "report.xml"
        arguments = ["-p", "no:cacheprovider", "-q", f"--basetemp={scratch / 't'}", f"--junitxml={report}", *tests]
        # relative ipc endpoints go to the current folder, and `python -m tests.signalkernel` must find the suite
        shutil.copytree(self.folder, scratch / "suite")
        done = subprocess.run(
            [self.python, "-m", "pytest", *arguments],
            cwd=scratch / "suite",
            env={**_without_pytest(os.environ), **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=900,
        )
        assert report.exists(), f"{label}: pytest did not get to its end:\n{done.stdout[-3000:]}"
        return _outcomes(report)


def _without_pytest(environ: Mapping[str, str]) -> dict[str, str]:
    """Drop what this test run has set for itself."""
    return {name: value for name, value in environ.items() if not name.startswith(("PYTEST_", "COV_", "PYTHONPATH"))}


def _outcomes(report: Path) -> dict[str, str]:
    """Read a junit report; the ids are `module.Class::name`."""
    found: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"
        wrong = [element for element in case if element.tag in ("failure", "error")]
        if wrong:
            found[name] = (wrong[0].get("message") or "failed")[:600]
        else:
            found.setdefault(name, "passed" if case.find("skipped") is None else "skipped")
    return found


def _node_id(name: str) -> str:
    """Turn an id of a report into one that pytest takes."""
    where, _, test = name.partition("::")
    module, _, group = where.partition(".")
    return "::".join(part for part in (f"tests/{module}.py", group, test) if part)


def _build(folder: Path, client: str, kernel: str) -> None:
    python = folder / "venv/bin/python"
    base = getattr(sys, "_base_executable", sys.executable)  # not this session's environment, which may go
    _must([base, "-m", "venv", str(folder / "venv")], "apt-get install python3-venv")
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    ours = [argument for name in ("gp-launchers", "gp-core") for argument in ("-e", str(PACKAGES / name))]
    _must([*pip, "install", *ours, f"jupyter_client=={client}", f"ipykernel=={kernel}", *TOOLS], "PyPI")
    sdist = ["--no-deps", "--no-binary=jupyter_client", f"--dest={folder}", f"jupyter_client=={client}"]
    _must([*pip, "download", *sdist], "PyPI")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        for member in archive:
            member.name = member.name.partition("/")[2]
            # its package stays behind: the installed one is what is tested
            if member.name == "pyproject.toml" or member.name.startswith("tests/"):
                archive.extract(member, folder / "suite")


def _must(command: list[str], needs: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise Unavailable(f"needs: {needs}: {(done.stderr or done.stdout).strip()[-500:]}")


@pytest.fixture
def suite(jupyter_env: JupyterEnv) -> Iterator[Suite]:
    """The suite of the installed jupyter_client, ready to run."""
    client, kernel = (importlib.metadata.version(name) for name in ("jupyter_client", "ipykernel"))
    # gp is installed in editable form: only its place and its metadata are in the environment
    parts = [str(PACKAGES), *TOOLS, kernel, *(path.read_text() for path in sorted(PACKAGES.glob("*/pyproject.toml")))]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
    name = f"jupyter-client-suite-{client}-py{platform.python_version()}-{digest}"
    folder = offer("jupyter-client-suite", lambda: cached(name, lambda folder: _build(folder, client, kernel)))
    try:
        yield Suite(folder / "suite", folder / "venv/bin/python", jupyter_env.home)
    finally:
        Installation(jupyter_env).end_processes()  # some of its tests leave their kernel running


def test_suite_of_jupyter_client(suite: Suite) -> None:
    runs = [
        (f"{label}{number}", provisioner, [f"tests/{name}.py" for name in names])
        for number, names in enumerate(SHARDS)
        for label, provisioner in (("l", "local-provisioner"), ("g", "gp-local-provisioner"))
    ]
    with ThreadPoolExecutor(len(runs)) as pool:
        local, ours = {}, {}
        for (label, *_), outcome in zip(runs, pool.map(lambda run: suite.run(*run), runs), strict=True):
            (local if label[0] == "l" else ours).update(outcome)
    demanded = {name for name, outcome in local.items() if outcome == "passed"}
    assert len(demanded) > 100, "the suite did not run"

    differ = {name for name in demanded if ours.get(name) != "passed"}
    if again := differ - EXPECTED.keys():
        # alone, a busy machine is no excuse
        ours |= suite.run("again", "gp-local-provisioner", [_node_id(name) for name in sorted(again)])
    print(f"passed: {len(demanded)} local, {len({n for n in demanded if ours.get(n) == 'passed'})} of them with gp")
    failed = {name: ours.get(name) for name in sorted(again) if ours.get(name) != "passed"}
    assert not failed, "\n\n".join(f"{name}: {outcome}" for name, outcome in failed.items())
    assert not (unneeded := EXPECTED.keys() & demanded - differ), f"these pass with gp: {unneeded}"
