"""`jupyter gp demo` as a program; takes about ten seconds each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

MAIN = "import sys; from gp_core.cli import main; sys.exit(main())"


def demo(tmp_path: Path, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run it with a home and a folder for temporary files of its own."""
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GP_", "JUPYTER_", "COV"))}
    places = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), "COLUMNS": "80"}
    command = [sys.executable, "-c", MAIN, "demo", *argv]
    return subprocess.run(
        command, env={**kept, **places, **env}, capture_output=True, text=True, timeout=180, check=False
    )


def nothing_is_left(tmp_path: Path) -> bool:
    mine = str(tmp_path)
    processes = [
        p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if mine in " ".join(p.info["cmdline"] or ())
    ]
    return not processes and not list((tmp_path / "home").rglob("*")) and not list((tmp_path / "tmp").iterdir())


@pytest.mark.timeout(200)
def test_the_whole_life_of_a_kernel_in_numbers(tmp_path: Path) -> None:
    # options of the installation do not count: this would forbid every start
    done = demo(tmp_path, "--json", GP_AUTHORIZED_USERS="nobody-else", GP_LAUNCH_TIMEOUT="0.1")
    assert done.stderr == ""
    assert done.returncode == 0
    data = json.loads(done.stdout)
    local = data.pop("local")
    for times in (data, local):
        assert times.pop("result") == "42"
        assert sorted(times) == ["death_seen_seconds", "interrupt_seconds", "ready_seconds", "restart_seconds"]
        assert all(0 < value < 60 for value in times.values())
    assert nothing_is_left(tmp_path)


@pytest.mark.timeout(200)
def test_people_get_a_table(tmp_path: Path) -> None:
    done = demo(tmp_path)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    for text in ("THROUGH GP", "LOCAL", "42", "endless loop", "restart", "kill -9"):
        assert text in done.stdout
    assert nothing_is_left(tmp_path)


def test_a_missing_ipykernel_is_one_line(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['ipykernel'] = None; import importlib.util as u; find = u.find_spec; "
    hide += "u.find_spec = lambda name, *a: None if name == 'ipykernel' else find(name, *a); "
    done = subprocess.run(
        [sys.executable, "-c", hide + MAIN, "demo"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "pip install ipykernel" in done.stderr
    assert done.stderr.count("\n") == 1
