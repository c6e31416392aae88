"""For the tests of `jupyter gp`: run it in this process, with a made-up package that offers a far backend."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, distributions
from pathlib import Path
from typing import Any

import pytest

from gp_core import plugins
from gp_core.cli import main

FAR = '''
import asyncio, json, os
from pathlib import Path
from traitlets import Int, List, Unicode
from gp_core import Backend, BackendError, Environment, Finding, RemoteProvisioner, State, Status, from_env, hookimpl

class FarBackend(Backend):
    """Jobs are files whose content is their state."""

    name = "far"
    remote_hosts = from_env(List(Unicode(), ["localhost"], help="Hosts."), "GP_REMOTE_HOSTS")
    cpus = Int(1, help="Processors.").tag(config=True)

    def _file(self, handle):
        return Path(os.environ["FAR_JOBS"], handle["kernel_id"])

    async def status(self, handle):
        file = self._file(handle)
        state = file.read_text() if file.exists() else "gone"
        if state == "silent":
            raise BackendError("the far platform does not answer")
        if state == "hanging":
            await asyncio.sleep(1000)
        return Status(state=State(state if state in ("pending", "gone") else "running"), host="far-1")

    async def terminate(self, handle, *, force):
        file = self._file(handle)
        job = file.read_text() if file.exists() else "gone"
        if job == "silent":
            raise BackendError("the far platform does not answer")
        if job == "hanging":
            await asyncio.sleep(1000)
        if job != "immortal" and (force or job != "stubborn"):
            file.unlink(missing_ok=True)

    async def logs(self, handle, *, tail=50):
        file = self._file(handle).with_suffix(".log")
        return "\\n".join(file.read_text().splitlines()[-tail:]) if file.exists() else ""

    async def discover(self, kernel_id=None):
        if os.environ.get("FAR_DISCOVERY") == "broken":
            raise BackendError("the far platform does not answer")
        jobs = [file.name for file in Path(os.environ["FAR_JOBS"]).iterdir() if not file.suffix]
        return [{"kernel_id": name} for name in jobs if kernel_id in (None, name)]

    async def environments(self, where):
        file = Path(os.environ["FAR_JOBS"], f"{where}.json")
        if not file.exists():
            raise BackendError(f"{where} does not answer")
        return [Environment.read(one, config={"remote_hosts": [where]}) for one in json.loads(file.read_text())]

    async def check(self):
        if self.remote_hosts == ["crash"]:
            raise RuntimeError("unforeseen")
        if self.remote_hosts == ["hang"]:
            await asyncio.sleep(1000)
        advice = {"down": "start it"}
        return [Finding(ok=host != "down", subject=f"host {host}", text="looked at", advice=advice.get(host, ""))
                for host in self.remote_hosts]

class FarProvisioner(RemoteProvisioner):
    backend_name = "far"

class TwinBackend(FarBackend):
    name = "twin"

    async def discover(self, kernel_id=None):
        return []

class TwinProvisioner(RemoteProvisioner):
    backend_name = "twin"

@hookimpl
def gp_backends():
    return [FarBackend, TwinBackend]
'''

METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
ENTRY_POINTS = """[gp_core]
far = gp_far

[jupyter_client.kernel_provisioners]
far-provisioner = gp_far:FarProvisioner
twin-one-provisioner = gp_far:TwinProvisioner
twin-two-provisioner = gp_far:TwinProvisioner
"""


def distribution(folder: Path, name: str, entry_points: str, version: str = "1.5") -> None:
    """Make what an installed package leaves in site-packages."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA.format(name=name, version=version))
    (info / "entry_points.txt").write_text(entry_points)
    importlib.invalidate_caches()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path for made-up packages, the only ones whose plugins count."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def made_up(group: str) -> list[EntryPoint]:
        found = distributions(path=[str(folder)])
        return [entry for package in found for entry in package.entry_points.select(group=group)]

    monkeypatch.setattr(plugins, "entry_points", made_up)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture
def far(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package gp-far with a backend for other machines; returns the folder of its jobs."""
    (site / "gp_far.py").write_text(FAR)
    distribution(site, "gp-far", ENTRY_POINTS)
    plugins.plugins.cache_clear()
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    monkeypatch.setenv("FAR_JOBS", str(jobs))
    return jobs


PLAIN: dict[str, Any] = {
    "argv": ["/opt/env/bin/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
    "display_name": "Python 3 (ipykernel)",
    "language": "python",
    "metadata": {"debugger": True},
    "something_new": [1],
}


def write_spec(tmp_path: Path, name: str, spec: dict[str, Any] | str = PLAIN, **changes: Any) -> Path:
    """Put a kernelspec where Jupyter finds it."""
    folder = tmp_path / "jupyter_data_dir/kernels" / name
    folder.mkdir(parents=True)
    text = spec if isinstance(spec, str) else json.dumps({**spec, **changes})
    (folder / "kernel.json").write_text(text)
    (folder / "logo-64x64.png").write_bytes(b"logo")
    return folder


def stanza(provisioner: str, **config: Any) -> dict[str, Any]:
    """The metadata that names a provisioner."""
    return {"kernel_provisioner": {"provisioner_name": provisioner, "config": config}}


@dataclass
class Ran:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


class Gp:
    """Runs ``jupyter gp`` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *argv: str) -> Ran:
        self._capsys.readouterr()
        code = main(argv)
        said = self._capsys.readouterr()
        assert "Traceback" not in said.err
        return Ran(code, said.out, said.err)

    def fails(self, *argv: str) -> str:
        """Run a command that must fail with one clear line, and return it."""
        ran = self(*argv)
        assert ran.code == 1
        assert ran.out == ""
        assert ran.err.startswith(f"jupyter gp {argv[0]}: ")
        assert ran.err.count("\n") == 1
        return ran.err

    def json(self, *argv: str) -> Any:
        """Run a command that must succeed, and return its data."""
        ran = self(*argv, "--json")
        assert ran.code == 0, ran.err
        return ran.data


@pytest.fixture
def gp(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Gp:
    """``jupyter gp`` on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    return Gp(capsys)
