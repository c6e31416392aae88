"""`jupyter gp` as a whole, its help, and `list`."""

# ruff: noqa: F401, F811  fixtures are imported, and arguments of the same name

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gp_core import __version__, plugins
from gp_core.cli import JupyterGP

from .cli_fixtures import Gp, distribution, far, gp, site

COMMANDS = sorted(JupyterGP.subcommands)


@pytest.mark.parametrize("argv", [[], *([command] for command in COMMANDS)], ids=lambda argv: " ".join(argv) or "top")
def test_every_help_fits_a_screen(gp: Gp, argv: list[str]) -> None:
    ran = gp(*argv, "--help")
    assert ran.code == 0
    lines = ran.out.rstrip("\n").split("\n")
    assert len(lines) <= 23  # the prompt needs one
    assert max(map(len, lines)) <= 80
    assert "--help-all" in ran.out


def test_the_help_names_every_command(gp: Gp) -> None:
    out = gp("--help").out
    assert [command for command in COMMANDS if f"\n  {command} " not in out] == []


@pytest.mark.parametrize(
    "argv", [["--help-all"], ["ps", "--help-all"], ["stop", "--help-all"], ["install", "--help-all"]]
)
def test_all_options_are_shown_on_demand(gp: Gp, far: Path, argv: list[str]) -> None:
    ran = gp(*argv)
    assert ran.code == 0
    for option in ("KernelServer.response_port", "ProvisionerOptions.launch_timeout", "FarBackend.remote_hosts"):
        assert f"--{option}=" in ran.out
    assert "GP_REMOTE_HOSTS" in ran.out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["lst"], "did you mean list?"),
        (["x"], "jupyter gp --help"),
        (["list", "--jsno"], "--jsno"),
        (["list", "extra"], "extra"),
        (["stop"], "KERNEL_ID"),
        (["ps", "--config", "/nowhere.py"], "/nowhere.py"),
        (["logs", "abc", "-n", "0"], "number of lines"),
        (["install", "far", "--from", "a", "--template", "b"], "not allowed with"),
    ],
)
def test_wrong_arguments_are_answered_in_one_line(gp: Gp, argv: list[str], said: str) -> None:
    ran = gp(*argv)
    assert ran.code == 2
    assert ran.out == ""
    assert said in ran.err
    assert ran.err.count("\n") == 1


def test_without_a_command_the_help_is_shown_as_an_error(gp: Gp) -> None:
    ran = gp()
    assert ran.code == 2
    assert "doctor" in ran.err


def test_version(gp: Gp) -> None:
    assert gp("--version").out == f"{__version__}\n"


def test_list_names_backends_with_package_and_provisioners(gp: Gp, far: Path) -> None:
    data = gp.json("list")
    assert data["problems"] == []
    backends = {backend.pop("name"): backend for backend in data["backends"]}
    assert backends["local"]["package"] == "gp-core"
    assert backends["far"] == {"package": "gp-far", "version": "1.5", "provisioners": ["far-provisioner"]}
    assert backends["twin"]["provisioners"] == ["twin-one-provisioner", "twin-two-provisioner"]
    ran = gp("list")
    assert ran.code == 0
    assert "far-provisioner" in ran.out


def test_list_tells_why_a_plugin_is_not_used(gp: Gp, site: Path) -> None:
    distribution(site, "gp-broken", "[gp_core]\nbroken = gp_broken\n")
    plugins.plugins.cache_clear()
    (problem,) = gp.json("list")["problems"]
    assert problem["plugin"] == "broken"
    assert "gp_broken" in problem["reason"]
    plugins.plugins.cache_clear()
    ran = gp("list")
    assert "plugin broken is not used" in ran.out
    assert ran.err == ""
    plugins.plugins.cache_clear()
    assert "plugin broken" in gp("ps").err


def test_a_configuration_file_and_options_of_classes_count(gp: Gp, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("c.KernelServer.user_source = 'env:NOBODY'\n")
    texts = [finding["text"] for finding in gp("doctor", "--json", "--config", str(file)).data["findings"]]
    assert any("NOBODY" in text for text in texts)
    texts = [f["text"] for f in gp("doctor", "--json", "--KernelServer.user_source=env:NOONE").data["findings"]]
    assert any("NOONE" in text for text in texts)


def test_a_wrong_value_of_an_option_is_one_line(gp: Gp) -> None:
    assert "response_port" in gp.fails("doctor", "--KernelServer.response_port=many")


def test_looking_leaves_nothing_behind(gp: Gp, tmp_path: Path, installation: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    for command in (["list"], ["doctor"], ["--help"], ["--help-all"]):
        gp(*command)
    assert sorted(tmp_path.rglob("*")) == before


def test_as_a_program_with_a_reader_that_stops() -> None:
    code = "import sys; from gp_core.cli import main; sys.exit(main())"
    done = subprocess.run(
        f"{sys.executable} -W error -c '{code}' --help-all | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith("Usage: jupyter gp")
    assert done.stderr == ""
