"""`jupyter gp ps`, `logs`, `stop` and `gc`, on made-up jobs and on one real kernel."""

# ruff: noqa: F401, F811  fixtures are imported, and arguments of the same name

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gp_core import server
from gp_core.cli import kernels, stop
from gp_core.store import FileStore, Owner, Record

from .cli_fixtures import Gp, far, gp, site
from .conftest import launchers

ALIVE = Owner.me()
DEAD = dataclasses.replace(ALIVE, started=1.0)
FOREIGN = dataclasses.replace(ALIVE, host="another-machine")

Make = Callable[..., str]


@pytest.fixture
def store(installation: Path) -> FileStore:
    return FileStore(installation / "kernels")


@pytest.fixture
def make(far: Path, store: FileStore) -> Make:
    """Write the record of a kernel and the job that it stands for; returns the id."""

    def made(kernel_id: str, job: str = "running", *, owner: Owner | None = DEAD, **more: Any) -> str:
        if job != "gone":
            (far / kernel_id).write_text(job)
        record = {
            "kernel_name": "py-far",
            "user": "alice",
            "backend": "far",
            "handle": {"kernel_id": kernel_id},
            "state": "running",
            "created": time.time() - 7200,
            "owner": owner,
            "token": "secret-token",
        }
        store.put(Record(kernel_id=kernel_id, **{**record, **more}))
        return kernel_id

    return made


def by_id(gp: Gp) -> dict[str, dict[str, Any]]:
    return {kernel["kernel_id"]: kernel for kernel in gp.json("ps")["kernels"]}


class TestPs:
    """What is listed."""

    def test_nothing(self, gp: Gp) -> None:
        assert gp("ps").out == "No kernels.\n"
        assert gp.json("ps") == {"kernels": []}

    def test_a_kernel_with_everything_but_its_secrets(self, gp: Gp, make: Make) -> None:
        make("k-1", owner=ALIVE, orphan_timeout=600.0, connection={"key": "secret-key"})
        ran = gp("ps", "--json")
        assert "secret" not in ran.out
        (kernel,) = ran.data["kernels"]
        assert kernel.pop("age_seconds") == pytest.approx(7200, abs=60)
        assert kernel.pop("created") == pytest.approx(time.time() - 7200, abs=60)
        assert kernel == {
            "kernel_id": "k-1",
            "kernel_name": "py-far",
            "user": "alice",
            "backend": "far",
            "host": "far-1",
            "state": "running",
            "job": "running",
            "handle": {"kernel_id": "k-1"},
            "detail": "",
            "owner": {"host": ALIVE.host, "pid": os.getpid(), "alive": True},
            "record": True,
            "channels": {"mode": "direct", "traffic": None},
            "orphan_timeout": 600.0,
            "lease_left": None,
        }

    def test_the_states(self, gp: Gp, make: Make) -> None:
        make("ends", "gone")
        make("waits", "pending", state="starting")
        make("starts", state="starting")
        make("exited", state="exited")
        make("silent", "silent")
        make("launched", "gone", handle=None, owner=ALIVE)
        make("half-launched", handle=None)
        states = {name: kernel["state"] for name, kernel in by_id(gp).items()}
        assert states == {
            "ends": "gone",
            "waits": "pending",
            "starts": "starting",
            "exited": "exited",
            "silent": "unknown",
            "launched": "pending",
            "half-launched": "running",
        }

    def test_owners(self, gp: Gp, make: Make) -> None:
        for name, owner in {"mine": ALIVE, "orphan": DEAD, "foreign": FOREIGN, "nobody's": None}.items():
            make(name.replace("'", ""), owner=owner)
        seen = {name: kernel["owner"] and kernel["owner"]["alive"] for name, kernel in by_id(gp).items()}
        assert seen == {"mine": True, "orphan": False, "foreign": True, "nobodys": None}

    def test_what_is_left_of_a_lease_is_told_as_far_as_it_is_known(self, gp: Gp, make: Make) -> None:
        make("served", owner=ALIVE)
        make("killed", orphan_timeout=600.0, secret="s")
        make("left", orphan_timeout=600.0, secret="s", left=time.time() - 400)
        make("long-ago", orphan_timeout=600.0, secret="s", left=time.time() - 700)
        make("never-called", orphan_timeout=600.0)
        make("ended", "gone", orphan_timeout=600.0)
        make("older", launcher_protocol=1, secret="s")
        left = {name: kernel["lease_left"] for name, kernel in by_id(gp).items()}
        assert left.pop("left") == {"seconds": pytest.approx(200, abs=30), "at_most": False}
        assert left == {
            "served": None,
            "killed": {"seconds": 600.0, "at_most": True},
            "long-ago": {"seconds": 0.0, "at_most": False},
            "never-called": {"seconds": 120.0, "at_most": True},
            "ended": None,
            "older": None,
        }
        told = " ".join(gp("ps").out.split())
        assert f"killed: its server ({DEAD}) is gone; at most 10 min left for another one to take it over" in told
        assert "long-ago: its server" in told
        assert "about 0 s left" in told
        assert "served:" not in told

    def test_people_see_it_on_a_narrow_terminal(self, gp: Gp, make: Make) -> None:
        make("0f7b3bd2-8f6e-4b34-9d0d-f4c1d1e1f001", owner=ALIVE, orphan_timeout=86400.0)
        make("0f7b3bd2-9f6e-4b34-9d0d-f4c1d1e1f001", "silent")
        out = gp("ps").out
        assert max(map(len, out.splitlines())) <= 80
        for seen in ("0f7b3bd2-8 ", "alice", "24 h", "2 h", f"pid {os.getpid()}", "gone", "does not answer"):
            assert seen in out

    def test_one_platform_that_hangs_does_not_hold_the_others_up(
        self, gp: Gp, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kernels, "DEADLINE", 0.3)
        make("hangs", "hanging")
        make("hangs-too", "hanging")
        make("runs")
        began = time.monotonic()
        states = {name: kernel["state"] for name, kernel in by_id(gp).items()}
        assert time.monotonic() - began < 3
        assert states == {"hangs": "unknown", "hangs-too": "unknown", "runs": "running"}

    def test_a_backend_that_is_not_installed_is_told(self, gp: Gp, make: Make) -> None:
        make("k", backend="lost")
        make("bad", options={"cpus": "x"})
        seen = by_id(gp)
        assert (seen["k"]["state"], seen["bad"]["state"]) == ("unknown", "unknown")
        assert "no backend 'lost'" in seen["k"]["detail"]

    def test_a_job_without_record_is_listed(self, gp: Gp, far: Path) -> None:
        (far / "stray").write_text("running")
        assert by_id(gp)["stray"]["record"] is False
        assert "no record" in gp("ps").out

    def test_a_platform_that_cannot_be_asked_for_jobs_is_told_in_one_line(
        self, gp: Gp, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make("k")
        monkeypatch.setenv("FAR_DISCOVERY", "broken")
        ran = gp("ps")
        assert ran.code == 0
        assert ran.err.startswith("note: ")
        assert "kernels of far" in ran.err
        assert ran.err.count("\n") == 1


class TestLogs:
    """The job's output."""

    def test_the_last_lines_by_a_part_of_the_id(self, gp: Gp, make: Make, far: Path) -> None:
        make("abc-1")
        long = "x" * 300
        (far / "abc-1.log").write_text(f"one\ntwo\n{long}\n")
        assert gp("logs", "abc").out == f"one\ntwo\n{long}\n"
        assert gp.json("logs", "abc-1", "-n", "1") == {"kernel_id": "abc-1", "log": long}

    def test_of_a_kernel_that_is_forgotten(self, gp: Gp, far: Path) -> None:
        (far / "old.log").write_text("its last words\n")
        assert gp("logs", "old").out == "its last words\n"

    def test_that_there_is_none(self, gp: Gp, make: Make) -> None:
        make("abc-1")
        assert "has written nothing" in gp.fails("logs", "abc-1")
        assert "no kernel 'zzz'" in gp.fails("logs", "zzz")


class TestStop:
    """Ending one kernel."""

    def test_an_orphan_goes_with_its_record(self, gp: Gp, make: Make, far: Path, store: FileStore) -> None:
        make("abc-1")
        assert gp.json("stop", "abc") == {
            "kernel_id": "abc-1",
            "stopped": True,
            "forced": False,
            "record_removed": True,
        }
        assert not (far / "abc-1").exists()
        assert store.list() == []

    def test_a_live_server_keeps_its_record(self, gp: Gp, make: Make, far: Path, store: FileStore) -> None:
        make("abc-1", owner=ALIVE)
        assert "is alive" in gp("stop", "abc-1").out
        assert not (far / "abc-1").exists()
        assert store.get("abc-1") is not None

    def test_one_that_does_not_listen_is_killed(
        self, gp: Gp, make: Make, far: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stop, "STOP", 0.2)
        make("abc-1", "stubborn")
        assert "had to be killed" in gp("stop", "abc-1").out
        assert not (far / "abc-1").exists()

    @pytest.mark.parametrize(
        ("job", "said"), [("immortal", "its job is running"), ("silent", "does not answer"), ("hanging", "no answer")]
    )
    def test_one_that_cannot_be_ended_keeps_its_record(
        self, gp: Gp, make: Make, store: FileStore, monkeypatch: pytest.MonkeyPatch, job: str, said: str
    ) -> None:
        monkeypatch.setattr(stop, "STOP", 0.1)
        monkeypatch.setattr(kernels, "DEADLINE", 0.1)
        make("abc-1", job)
        assert said in gp.fails("stop", "abc-1")
        assert store.get("abc-1") is not None

    def test_a_job_without_record_can_be_named(self, gp: Gp, far: Path) -> None:
        (far / "stray").write_text("running")
        assert gp("stop", "stray").code == 0
        assert not (far / "stray").exists()

    def test_an_id_must_be_unique_or_whole(self, gp: Gp, make: Make, far: Path) -> None:
        make("abc")
        make("abc-1")
        make("abc-2")
        assert "begins 3 kernel ids" in gp.fails("stop", "ab")
        assert gp("stop", "abc").code == 0
        assert sorted(file.name for file in far.iterdir()) == ["abc-1", "abc-2"]


class TestGc:
    """What is removed, and what never is."""

    @pytest.fixture
    def mixture(self, make: Make, far: Path) -> None:
        make("dead", "gone")
        make("never-launched", "gone", handle=None)
        make("orphan")
        make("served", owner=ALIVE)
        make("served-dead", "gone", owner=ALIVE)
        make("foreign", owner=FOREIGN)
        make("silent", "silent")
        (far / "stray").write_text("running")

    @pytest.mark.usefixtures("mixture")
    def test_only_what_cannot_be_used_any_more(self, gp: Gp, store: FileStore, far: Path) -> None:
        wanted = {"dead": "removed", "never-launched": "removed", "orphan": "kept", "silent": "kept", "stray": "kept"}
        data = gp.json("gc", "--dry-run")
        assert data["dry_run"] is True
        assert {kernel["kernel_id"]: kernel["action"] for kernel in data["kernels"]} == wanted
        assert len(store.list()) == 7
        data = gp.json("gc")
        assert {kernel["kernel_id"]: kernel["action"] for kernel in data["kernels"]} == wanted
        left = {record.kernel_id for record in store.list()}
        assert left == {"orphan", "served", "served-dead", "foreign", "silent"}
        assert (far / "orphan").exists()
        assert (far / "stray").exists()

    @pytest.mark.usefixtures("mixture")
    def test_all_ends_what_nobody_serves(self, gp: Gp, store: FileStore, far: Path) -> None:
        out = gp("gc", "--dry-run", "--all").out
        assert "ended" in out
        assert (far / "orphan").exists()
        gp.json("gc", "--all")
        assert {record.kernel_id for record in store.list()} == {"served", "served-dead", "foreign", "silent"}
        assert sorted(file.name for file in far.iterdir()) == ["foreign", "served", "silent"]

    @pytest.mark.usefixtures("mixture")
    def test_people_are_told_of_all(self, gp: Gp) -> None:
        out = gp("gc").out
        assert "jupyter gp gc --all" in out
        assert max(map(len, out.splitlines())) <= 80

    def test_a_platform_that_cannot_be_asked_is_not_one_where_nothing_runs(
        self, gp: Gp, make: Make, store: FileStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make("half-launched", "gone", handle=None)
        monkeypatch.setenv("FAR_DISCOVERY", "broken")
        assert gp.json("gc", "--all")["kernels"][0]["action"] == "kept"
        assert store.get("half-launched") is not None

    def test_one_that_cannot_be_ended_is_a_failure(self, gp: Gp, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stop, "STOP", 0.1)
        make("abc-1", "immortal")
        ran = gp("gc", "--all", "--json")
        assert ran.code == 1
        assert ran.data["kernels"][0]["action"] == "failed"

    def test_nothing(self, gp: Gp) -> None:
        assert gp("gc").out == "Nothing to remove.\n"


SERVER = """
import sys, time
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

class Specs(KernelSpecManager):
    def get_kernel_spec(self, name):
        config = {"startup_confirmation": "hello"}
        stanza = {"provisioner_name": "gp-local-provisioner", "config": config}
        argv = ["sh", "-c", "echo hello from the kernel; exec sleep 1000"]
        return KernelSpec(argv=argv, display_name=name, language="sh", metadata={"kernel_provisioner": stanza})

manager = KernelManager(kernel_name="sleeper", kernel_spec_manager=Specs(), kernel_id="real-kernel-1")
manager.start_kernel()
print("started", flush=True)
time.sleep(1000)
"""


def test_a_real_kernel_whose_server_was_killed(gp: Gp, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == "started\n"
            kernel = by_id(gp)["real-kernel-1"]
            assert (kernel["state"], kernel["owner"]["pid"]) == ("running", owner.pid)
            assert gp.json("gc", "--all") == {"dry_run": False, "kernels": []}
        finally:
            owner.send_signal(signal.SIGKILL)
    assert by_id(gp)["real-kernel-1"]["owner"]["alive"] is False
    assert "hello from the kernel" in gp("logs", "real").out
    assert gp("stop", "real").code == 0
    assert by_id(gp) == {}
    assert launchers() == []
    assert server._server is not None
    assert server._server[1].rendezvous is None  # looking after kernels opens no listener
