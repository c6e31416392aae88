from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from launcher_kit import SOURCES, TOKEN

import gp_launchers
from gp_launchers import bundle

BUILD = "import sys; from gp_launchers import bundle; bundle.build(sys.argv[1])"


def pythons():
    """Return every Python from 3.8 on that this machine has and that runs."""
    found = {}
    behind = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    for version in (f"3.{minor}" for minor in range(8, 20)):
        candidates = [str(path) for path in behind.glob(f"{version}.*/bin/python")]
        path = next(iter(candidates), None) or shutil.which(f"python{version}")
        if path and subprocess.run([path, "-c", "pass"], capture_output=True, check=False).returncode == 0:
            found[version] = path
    return found or {"this": sys.executable}


PYTHONS = pythons()


@pytest.fixture(scope="session")
def pyz(tmp_path_factory):
    return bundle.build(tmp_path_factory.mktemp("bundle") / "gp-launcher.pyz")


def test_small_private_and_with_a_shebang(pyz):
    assert os.path.getsize(pyz) < 100_000
    assert stat.S_IMODE(os.stat(pyz).st_mode) == 0o644
    assert Path(pyz).read_bytes().startswith(b"#!/usr/bin/env python3\n")
    assert os.listdir(os.path.dirname(pyz)) == ["gp-launcher.pyz"]
    assert zipfile.ZipFile(pyz).testzip() is None


def test_reproducible(pyz, tmp_path):
    digests = {hashlib.sha256(Path(pyz).read_bytes()).hexdigest()}
    for seed in ("0", "1", "77"):
        target = tmp_path / seed
        env = {**os.environ, "PYTHONPATH": str(SOURCES), "PYTHONHASHSEED": seed, "TZ": "Asia/Tokyo"}
        subprocess.run([sys.executable, "-c", BUILD, target], env=env, check=True, umask=0o077)
        digests.add(hashlib.sha256(target.read_bytes()).hexdigest())
    copied = tmp_path / "elsewhere" / "gp_launchers"
    shutil.copytree(Path(gp_launchers.__file__).parent, copied, ignore=shutil.ignore_patterns("__pycache__"))
    env = {**os.environ, "PYTHONPATH": str(copied.parent)}
    subprocess.run([sys.executable, "-c", BUILD, tmp_path / "moved"], env=env, check=True)
    digests.add(hashlib.sha256((tmp_path / "moved").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_failed_build_leaves_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "gp-launcher.pyz"
    target.write_text("the old one")
    monkeypatch.setattr(bundle, "_sources", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bundle.build(target)
    assert target.read_text() == "the old one"
    assert os.listdir(tmp_path) == ["gp-launcher.pyz"]


def first_modules(command, options):
    """Return our modules that a launcher has imported when it starts the kernel."""
    spy = (
        "import os, sys\n"
        "def fork():\n"
        "    print(' '.join(sys.modules)); sys.stdout.flush(); os._exit(0)\n"
        "os.fork = fork\n"
    )
    code = spy + f"sys.path.insert(0, {command!r})\nfrom gp_launchers.__main__ import main\nmain()"
    env = {"GP_LAUNCH_SECRETS": json.dumps({"token": TOKEN, "connection": {"key": "k"}, "env": {"A": "b"}})}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, *options], env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_nothing_slow_is_imported_before_the_kernel(launch):
    modules = first_modules(str(SOURCES), launch.command()[3:])
    ours = {name.partition(".")[2] or "__init__" for name in modules if name.startswith("gp_launchers")}
    assert ours == set(bundle.FIRST)
    slow = {"ssl", "socket", "json", "re", "enum", "ctypes", "subprocess", "signal", "selectors", "threading", "typing"}
    assert slow.isdisjoint(modules)


@pytest.mark.parametrize("version", PYTHONS)
def test_it_runs_with_every_python(launch, server, pyz, version):
    command = launch.command((), (), (PYTHONS[version], "-I", "-S", pyz))
    running = launch(command=command)
    connection, hello = server.meet(20)
    assert connection.next("listening")["run"] == 1
    if version != "this":
        assert hello["python"].startswith(version + ".")
    connection.send(type="restart", run=2)
    assert connection.next("listening")["run"] == 2
    connection.send(type="shutdown", grace=1)
    assert connection.next("exited")["code"] == -15
    assert running.wait() == 0
    assert running.log.count("Warning") == 0


@pytest.mark.parametrize("version", PYTHONS)
def test_sources_compile_with_every_python(version):
    """Warnings are errors: an invalid escape, for example, would be printed into every kernel's log."""
    code = "import sys; [compile(open(f, encoding='utf-8').read(), f, 'exec') for f in sys.argv[1:]]"
    sources = [str(path) for path in Path(gp_launchers.__file__).parent.glob("*.py")]
    subprocess.run([PYTHONS[version], "-W", "error", "-c", code, *sources], check=True)


def test_ipykernel_is_the_default(launch, server):
    running = launch(command=launch.command(None))
    connection, _ = server.meet()
    assert connection.next("listening", 60)
    connection.send(type="restart", run=2)
    assert connection.next("listening", 60)["run"] == 2
    connection.send(type="shutdown", grace=5)
    assert running.wait(20) == 0
