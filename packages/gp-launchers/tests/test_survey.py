"""What is found on a host: made-up homes, looked at by this Python."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gp_launchers import survey

IPYKERNEL = ["-m", "ipykernel_launcher", "-f", "{connection_file}"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and nothing else on the host."""
    made = tmp_path / "ho me"
    made.mkdir()
    monkeypatch.setenv("HOME", str(made))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    for name in ("CONDA", "OTHERS", "SPECS"):
        monkeypatch.setattr(survey, name, tuple(path for path in getattr(survey, name) if path.startswith("~")))
    return made


def environment(prefix: Path, *, version: str = "3.12", ipykernel: bool = True, conda: bool = False) -> Path:
    """Make what an environment leaves on disk."""
    packages = prefix / f"lib/python{version}/site-packages"
    (packages / "ipykernel" if ipykernel else packages).mkdir(parents=True)
    if ipykernel:
        (packages / "ipykernel/__init__.py").touch()
    program(prefix / "bin/python3")
    if conda:
        (prefix / "conda-meta").mkdir()
    else:
        (prefix / "pyvenv.cfg").touch()
    return prefix


def program(path: Path, text: str = "#!/bin/sh\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def kernelspec(folder: Path, argv: list[str], **more: Any) -> None:
    folder.mkdir(parents=True)
    spec = {"argv": argv, "display_name": folder.name.upper(), "language": "x", **more}
    (folder / "kernel.json").write_text(json.dumps(spec))


def found() -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in survey.found()}


def test_environments_have_the_names_that_people_know(home: Path) -> None:
    (environment(home / "miniconda3", conda=True, version="3.11") / "condabin").mkdir()
    environment(home / "miniconda3/envs/science", conda=True)
    environment(home / "work/.venv", version="3.9")
    environment(home / "plain-venv")
    environment(home / "without", ipykernel=False)
    (home / "documents").mkdir()
    here = found()
    assert {name: one["display_name"] for name, one in here.items()} == {
        "base": "Python 3.11 (base)",
        "science": "Python 3.12 (science)",
        "work": "Python 3.9 (work)",
        "plain-venv": "Python 3.12 (plain-venv)",
    }
    science = here["science"]
    assert science["argv"] == [f"{home}/miniconda3/envs/science/bin/python3", *IPYKERNEL]
    assert science["env"] == {
        "PATH": f"{home}/miniconda3/envs/science/bin:${{PATH}}",
        "CONDA_PREFIX": f"{home}/miniconda3/envs/science",
        "CONDA_DEFAULT_ENV": "science",
    }
    assert here["work"]["env"]["VIRTUAL_ENV"] == f"{home}/work/.venv"


def test_an_environment_elsewhere_that_conda_lists(home: Path, tmp_path: Path) -> None:
    environment(tmp_path / "data/env1", conda=True)
    (home / ".conda").mkdir()
    (home / ".conda/environments.txt").write_text(f"{tmp_path}/data/env1\n{tmp_path}/gone\n")
    assert found()["env1"]["origin"] == f"{tmp_path}/data/env1"


def test_a_kernel_with_a_kernelspec_of_the_user_is_that_one(home: Path) -> None:
    prefix = environment(home / "venvs/science")
    spec = home / ".local/share/jupyter/kernels/mine"
    kernelspec(spec, [f"{prefix}/bin/python3", "-Xfrozen_modules=off", *IPYKERNEL], env={"A": "1"})
    assert [one["display_name"] for one in survey.found()] == ["MINE"]
    assert found()["mine"]["env"] == {"A": "1"}


def test_other_languages_of_an_environment(home: Path) -> None:
    prefix = environment(home / "miniforge3/envs/r", conda=True)
    program(prefix / "bin/R")
    kernelspec(prefix / "share/jupyter/kernels/ir", ["R", "-e", "{resource_dir}/x", "{connection_file}"])
    kernelspec(prefix / "share/jupyter/kernels/python3", ["python", *IPYKERNEL])
    kernelspec(prefix / "share/jupyter/kernels/lost", ["no-such-program", "{connection_file}"])
    here = found()
    assert set(here) == {"r", "r-ir"}
    assert here["r-ir"]["argv"][:3] == [f"{prefix}/bin/R", "-e", f"{prefix}/share/jupyter/kernels/ir/x"]
    assert here["r-ir"]["display_name"] == "IR (r)"


def test_what_jupyter_lists_besides(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "tool")
    kernelspec(tmp_path / "shared/special", [str(tmp_path / "tool"), "{connection_file}"])
    listed = {"kernelspecs": {"special": {"resource_dir": str(tmp_path / "shared/special"), "spec": {}}}}
    program(tmp_path / "bin/jupyter", f"#!/bin/sh\necho '{json.dumps(listed)}'\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.defpath}")
    assert found()["special"]["argv"] == [str(tmp_path / "tool"), "{connection_file}"]


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "[]",
        '{"argv": []}',
        '{"argv": ["python3"], "metadata": 7}',
        '{"argv": ["/bin/sh", "-c", "no file"]}',
        '{"argv": ["/bin/sh", "{connection_file}"], "metadata": {"kernel_provisioner": {"provisioner_name": "far"}}}',
        '{"argv": ["/bin/sh", "{connection_file}"], "env": [1]}',
    ],
)
def test_kernelspecs_that_cannot_be_started_there_are_left_out(home: Path, text: str) -> None:
    folder = home / ".local/share/jupyter/kernels/odd"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(text)
    assert found() == {}
