import asyncio
import dataclasses
import json
import logging
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gp_core.errors import StoreError
from gp_core.runtime import runtime
from gp_core.store import FileStore, InTurn, Owner, Record


def record(kernel_id: str = "k1", **more: object) -> Record:
    return Record(kernel_id=kernel_id, kernel_name="python3", user="ann", backend="local", **more)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "kernels")


def test_a_record_comes_back_whole(store: FileStore) -> None:
    put = record(handle={"pid": 1}, connection={"key": "k", "shell_port": 5}, secret="s", owner=Owner.me(), created=2.5)
    store.put(put)
    assert store.get("k1") == put
    assert store.list() == [put]
    store.remove("k1")
    store.remove("k1")
    assert store.get("k1") is None


def test_files_are_private(store: FileStore) -> None:
    old = os.umask(0)
    try:
        store.put(record())
    finally:
        os.umask(old)
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((store.folder / "k1.json").stat().st_mode) == 0o600


def test_secrets_are_not_in_the_repr() -> None:
    shown = repr(record(token="TOKEN", secret="SECRET", connection={"key": "KEY"}))
    assert not any(word in shown for word in ("TOKEN", "SECRET", "KEY"))


NEARLY = '{"kernel_id": "k2", "kernel_name": "x", "user": "u", "backend": "local", %s}'


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"kernel_id": 3}', '{"kernel_id": "other"}', "\x00"]
    + [NEARLY % wrong for wrong in ('"created": "y"', '"connection": []', '"handle": "h"', '"orphan_timeout": null')],
)
def test_what_is_no_record_is_reported_and_skipped(
    store: FileStore, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(record())
    (store.folder / "k2.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert [found.kernel_id for found in store.list()] == ["k1"]
    assert "k2.json is skipped" in caplog.text


def test_fields_of_a_newer_version_are_ignored(store: FileStore) -> None:
    store.put(record())
    path = store.folder / "k1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99, "colour": "red"}))
    assert store.get("k1") == record()


@pytest.mark.parametrize("kernel_id", ["../x", "a/b", "", ".hidden", "a\0b", "x" * 300])
def test_a_kernel_id_cannot_leave_the_folder(store: FileStore, kernel_id: str) -> None:
    with pytest.raises(StoreError, match="cannot be a file name"):
        store.put(record(kernel_id))


def test_a_full_disk_leaves_the_old_record_and_no_rubbish(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(record(run=1))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        store.put(record(run=2))
    assert store.get("k1") == record(run=1)
    assert [path.name for path in store.folder.iterdir()] == ["k1.json"]


def test_an_owner_is_dead_when_its_process_is_or_the_number_belongs_to_another_one() -> None:
    me = Owner.me()
    assert me.is_alive()
    assert not Owner(me.host, me.pid, me.started - 100).is_alive()
    assert not Owner(me.host, max(psutil.pids()) + 10_000, me.started).is_alive()
    assert Owner("elsewhere.example", 1, 0.0).is_alive()


def test_an_owner_that_nobody_reaps_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        owner = Owner(Owner.me().host, process.pid, psutil.Process(process.pid).create_time())
        assert owner.is_alive()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
        assert not owner.is_alive()


GONE = dataclasses.replace(Owner.me(), started=1.0)


def test_the_lease_of_an_owner_that_is_gone_can_be_taken(store: FileStore) -> None:
    me, elsewhere = Owner.me(), Owner("elsewhere.example", 1, 0.0)
    assert store.take("k1", me) is None
    assert not store.folder.exists()
    for former, left in ((GONE, 5.0), (None, None)):
        store.put(record(owner=former, left=left, secret="s"))
        assert store.take("k1", me) == record(owner=me, secret="s")
        assert store.get("k1") == record(owner=me, secret="s")
    assert store.take("k1", elsewhere) == record(owner=me, secret="s")
    assert [path.name for path in store.folder.iterdir()] == ["k1.json"]


def test_a_lease_that_cannot_be_written_is_not_taken(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(record(owner=GONE))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        store.take("k1", Owner.me())
    assert store.get("k1") == record(owner=GONE)


RIVAL = """
import sys
from pathlib import Path
from gp_core.store import FileStore, Owner
store, me = FileStore(Path(sys.argv[1])), Owner.me()
print("ready", flush=True)
input()
print(*(name for name in sys.argv[2:] if store.take(name, me).owner == me), flush=True)
input()
"""


def test_of_several_processes_exactly_one_gets_a_lease(store: FileStore) -> None:
    names = [f"k{number}" for number in range(60)]
    for name in names:
        store.put(record(name, owner=GONE))
    argv = [sys.executable, "-c", RIVAL, str(store.folder), *names]
    rivals = [
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(4)
    ]
    try:
        assert [rival.stdout.readline() for rival in rivals if rival.stdout] == ["ready\n"] * 4
        for rival in rivals:
            assert rival.stdin is not None
            rival.stdin.write("go\n")
        taken = [name for rival in rivals if rival.stdout for name in rival.stdout.readline().split()]
        assert sorted(taken) == sorted(names)
    finally:
        for rival in rivals:
            rival.kill()
            rival.communicate()


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_reading_a_record_never_fails_in_another_way(data: object) -> None:
    try:
        Record.from_json(json.dumps(data))
    except StoreError:
        pass


class SlowStore(FileStore):
    """Notes what is written, and writes only when it may."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.may, self.written = threading.Event(), list[str]()

    def put(self, record: Record) -> None:
        self.may.wait(5)
        self.written.append(record.state)
        if record.state == "bad":
            raise StoreError("no")
        super().put(record)


async def in_turn(store: SlowStore, *states: str) -> list[object]:
    """Write some records one after the other, the first of which is slow, or remove them; return what came of each."""

    async def use() -> list[object]:
        turns, asked = InTurn(store), []
        for state in states:
            work = turns.remove("k1") if state == "removed" else turns.put(record(state=state))
            asked.append(asyncio.create_task(work))
            await asyncio.sleep(0.01)
        store.may.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    return await runtime().call(use())


async def test_a_record_that_waits_gives_way_to_a_newer_one(tmp_path: Path) -> None:
    store = SlowStore(tmp_path / "kernels")
    assert await in_turn(store, "first", "second", "third") == [None] * 3
    assert store.written == ["first", "third"]


async def test_everybody_who_waits_for_a_write_hears_that_it_failed(tmp_path: Path) -> None:
    first, *others = await in_turn(SlowStore(tmp_path / "kernels"), "first", "second", "bad")
    assert first is None
    assert [type(other) for other in others] == [StoreError] * 2


@pytest.mark.parametrize(
    ("states", "left"),
    [
        (("first", "second", "removed"), None),
        (("first", "second", "removed", "fourth"), "fourth"),
        (("first", "removed", "third", "fourth", "removed"), None),
    ],
)
async def test_writes_and_removals_keep_their_order(tmp_path: Path, states: tuple[str, ...], left: str | None) -> None:
    store = SlowStore(tmp_path / "kernels")
    assert await in_turn(store, *states) == [None] * len(states)
    found = store.get("k1")
    assert (found and found.state) == left


def test_what_a_killed_process_had_begun_to_write_is_swept(store: FileStore) -> None:
    store.put(record())
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead, alive = (store.folder / f".{pid}-abc" for pid in (int(done.stdout), os.getpid()))
    for path in (dead, alive):
        path.write_text("half a record")
    store.sweep()
    assert dead.exists(), "too new: its writer may be elsewhere"
    for path in (dead, alive):
        os.utime(path, (1, 1))
    store.sweep()
    assert not dead.exists()
    assert alive.exists()
    assert [found.kernel_id for found in store.list()] == ["k1"]
