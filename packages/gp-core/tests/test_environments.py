"""`jupyter gp install BACKEND --discover` and `--refresh`."""

# ruff: noqa: F401, F811  fixtures are imported, and arguments of the same name

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .cli_fixtures import Gp, far, gp, site, stanza, write_spec

IPYKERNEL = ["-m", "ipykernel_launcher", "-f", "{connection_file}"]


def environment(name: str, **changes: Any) -> dict[str, Any]:
    """What a far side tells of one."""
    told = {
        "name": name,
        "display_name": f"Python 3.12 ({name})",
        "argv": [f"/opt/{name}/bin/python", *IPYKERNEL],
        "language": "python",
        "env": {"PATH": f"/opt/{name}/bin:${{PATH}}"},
        "interrupt_mode": "signal",
        "origin": f"/opt/{name}",
    }
    return {**told, **changes}


def there(far: Path, where: str, *found: dict[str, Any]) -> None:
    """Say what is at a place from now on."""
    (far / f"{where}.json").write_text(json.dumps(found))


def spec_of(tmp_path: Path, name: str) -> Path:
    return tmp_path / "jupyter_data_dir/kernels" / name / "kernel.json"


def read(tmp_path: Path, name: str) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(spec_of(tmp_path, name).read_text())
    return spec


def states(data: dict[str, Any]) -> dict[str, str]:
    return {row["name"]: row["state"] for row in data["kernelspecs"]}


def test_what_is_there_is_shown_and_what_to_say_next(gp: Gp, far: Path, tmp_path: Path) -> None:
    there(far, "h1", environment("science"), environment("My Env!"))
    there(far, "h2", environment("science"))
    said = gp("install", "far", "--host", "h1,h2", "--discover")
    assert said.code == 0
    for part in ("h1-science", "h1-my-env", "h2-science", "Python 3.12 (science) @ h2", "/opt/science"):
        assert part in said.out
    assert "jupyter gp install far --host h1,h2 --discover NAME" in said.out
    assert "far --image h1 --discover NAME" in gp("install", "far", "--image", "h1", "--discover").out
    assert not (tmp_path / "jupyter_data_dir/kernels").exists()


def test_those_with_the_names_are_installed(gp: Gp, far: Path, tmp_path: Path) -> None:
    there(far, "h1", environment("science"), environment("base"))
    there(far, "h2", environment("science"))
    said = gp.json("install", "far", "--host", "h1,h2", "--set", "cpus=4", "--discover", "*-science")
    assert states(said) == {"h1-science": "installed", "h1-base": "no", "h2-science": "installed"}
    spec = read(tmp_path, "h2-science")
    assert spec["metadata"]["kernel_provisioner"] == {
        "provisioner_name": "far-provisioner",
        "config": {"remote_hosts": ["h2"], "cpus": 4},
    }
    assert spec["argv"] == ["/opt/science/bin/python", *IPYKERNEL]
    assert spec["display_name"] == "Python 3.12 (science) @ h2"
    assert spec["env"] == {"PATH": "/opt/science/bin:${PATH}"}


def test_equal_names_get_numbers(gp: Gp, far: Path) -> None:
    there(far, "h1", environment("env", origin="/a"), environment("env", origin="/b"))
    assert list(states(gp.json("install", "far", "--host", "h1", "--discover"))) == ["h1-env", "h1-env-2"]


def test_a_kernelspec_of_that_name_stays(gp: Gp, far: Path, tmp_path: Path) -> None:
    there(far, "h1", environment("science"))
    write_spec(tmp_path, "h1-science", display_name="mine")
    assert states(gp.json("install", "far", "--host", "h1", "--discover", "*")) == {"h1-science": "was there"}
    assert read(tmp_path, "h1-science")["display_name"] == "mine"
    gp("install", "far", "--host", "h1", "--replace", "--discover", "*")
    assert read(tmp_path, "h1-science")["display_name"] != "mine"


def test_a_place_without_an_answer_is_told_and_the_others_count(gp: Gp, far: Path) -> None:
    there(far, "h1", environment("science"))
    said = gp("install", "far", "--host", "h1,h9", "--discover", "h1-science")
    assert said.code == 1
    assert said.err == "note: h9 does not answer\n"
    assert "installed" in said.out


def test_refresh_follows_what_has_changed_and_keeps_what_people_have_set(gp: Gp, far: Path, tmp_path: Path) -> None:
    there(far, "h1", environment("science"), environment("old"), environment("same"))
    there(far, "h2", environment("other"))
    gp("install", "far", "--host", "h1,h2", "--discover", "*")
    spec = read(tmp_path, "h1-science")
    spec["display_name"] = "Ours"
    spec["metadata"]["kernel_provisioner"]["config"]["cpus"] = 2
    spec_of(tmp_path, "h1-science").write_text(json.dumps(spec))
    write_spec(tmp_path, "by-hand", metadata=stanza("far-provisioner", remote_hosts=["h1"]))
    there(far, "h1", environment("science", argv=["/opt/science/bin/python3.13", *IPYKERNEL]), environment("same"))
    (far / "h2.json").unlink()

    said = gp("install", "far", "--refresh", "--json")
    assert states(json.loads(said.out)) == {"h1-science": "updated", "h1-old": "removed", "h1-same": "kept"}
    assert said.code == 1, "h2 does not answer"
    now = read(tmp_path, "h1-science")
    assert now["argv"][0] == "/opt/science/bin/python3.13"
    assert now["display_name"] == "Ours"
    assert now["metadata"]["kernel_provisioner"]["config"] == {"remote_hosts": ["h1"], "cpus": 2}
    left = {path.name for path in (tmp_path / "jupyter_data_dir/kernels").iterdir()}
    assert left == {"h1-science", "h1-same", "h2-other", "by-hand"}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["far", "--discover"], "--host"),
        (["local", "--host", "h1", "--discover"], "cannot look for environments"),
        (["far", "--host", "h1", "--discover", "nothing"], "there are: h1-science"),
        (["far", "--host", "h1", "--set", "cpus=many", "--discover"], "cpus"),
    ],
)
def test_mistakes_are_told(gp: Gp, far: Path, argv: list[str], said: str) -> None:
    there(far, "h1", environment("science"))
    ran = gp("install", *argv)
    assert ran.code == 1
    assert said in ran.err


@pytest.mark.parametrize(
    "told",
    [{"argv": []}, {"argv": [1]}, {"env": {"A": 1}}, {"name": None}, {"env": []}, {"argv": "python"}],
)
def test_a_far_side_that_tells_nonsense_is_refused(gp: Gp, far: Path, told: dict[str, Any]) -> None:
    there(far, "h1", {**environment("science"), **told})
    ran = gp("install", "far", "--host", "h1", "--discover")
    assert (ran.code, ran.out) == (1, "")
    assert "h1: the far side tells" in ran.err


def test_a_far_side_cannot_write_to_the_terminal_or_out_of_the_folder(gp: Gp, far: Path, tmp_path: Path) -> None:
    there(far, "h1", environment("../../x", display_name="\x1b[2J\nPython"))
    said = gp("install", "far", "--host", "h1", "--discover", "*")
    assert "\x1b" not in said.out
    assert [path.name for path in (tmp_path / "jupyter_data_dir/kernels").iterdir()] == ["h1-..-..-x"]
