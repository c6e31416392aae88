from __future__ import annotations

import os
import socket
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gp_launchers import cleanup, files
from gp_launchers.errors import StartError
from gp_launchers.ports import NAMES, Ports
from gp_launchers.probe import accepts, path_is_free


def template(**fields):
    return {"transport": "tcp", "ip": "127.0.0.1", **fields}


@pytest.fixture
def choose(tmp_path):
    made = []

    def choose(connection, port_range=(0, 0)):
        made.append(Ports(connection, port_range, str(tmp_path)))
        return made[-1]

    yield choose
    for ports in made:
        ports.release()


def listener(port, ip="127.0.0.1", reuse=True):
    bound = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
    try:
        if reuse:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((ip, port))
        bound.listen()
    except OSError:
        bound.close()
        raise
    return bound


@pytest.mark.parametrize("ip", ["127.0.0.1", "0.0.0.0", "", "*", "localhost", "::1", "::"])
def test_five_different_ports_that_a_kernel_can_bind_while_we_hold_them(choose, ip):
    ports = choose(template(ip=ip))
    assert list(ports.numbers) == list(NAMES)
    assert len(set(ports.numbers.values())) == 5
    assert not accepts(ports, "shell_port")
    with listener(ports.numbers["shell_port"], "0.0.0.0" if ip in ("", "*") else ip):
        assert accepts(ports, "shell_port")


def test_held_ports_are_nobody_elses(choose):
    ports = choose(template())
    with pytest.raises(OSError, match="in use"):
        listener(ports.numbers["hb_port"], reuse=False)
    ports.release()
    listener(ports.numbers["hb_port"], reuse=False).close()


def test_many_launchers_at_once_share_no_port(choose):
    numbers = [number for _ in range(60) for number in choose(template()).numbers.values()]
    assert len(set(numbers)) == 300


def free_range(width):
    """Return a range of ports below those that the system gives away, free at this moment."""
    for low in range(20000, 30000, width):
        try:
            for port in range(low, low + width):
                listener(port).close()
            return low, low + width - 1
        except OSError:
            continue
    raise AssertionError("no free range")


def test_a_range_is_kept_and_taken_ports_are_left_out(choose):
    low, high = free_range(8)
    with listener(low + 1), listener(low + 4):
        ports = choose(template(), (low, high))
        assert set(ports.numbers.values()) <= set(range(low, high + 1)) - {low + 1, low + 4}
        with pytest.raises(StartError) as caught:
            choose(template(), (low, high))
    assert caught.value.reason == "NoPort"
    assert f"{low}..{high}" in caught.value.detail


@settings(max_examples=20, deadline=None)
@given(low=st.integers(20000, 29000), width=st.integers(50, 500))
def test_ports_lie_in_any_range(low, width):
    ports = Ports(template(), (low, low + width), "/")
    try:
        assert all(low <= number <= low + width for number in ports.numbers.values())
        assert len(set(ports.numbers.values())) == 5
    finally:
        ports.release()


def test_ports_of_the_template_are_used_when_free(choose):
    first = choose(template()).numbers
    wanted = {name: first[name] for name in ("shell_port", "iopub_port")}
    choose(template())
    with listener(first["shell_port"]):
        ports = choose(template(**wanted))
        assert ports.numbers["shell_port"] != first["shell_port"]
        assert ports.numbers["iopub_port"] == first["iopub_port"]


def test_an_address_of_another_machine_is_no_port(choose):
    with pytest.raises(StartError) as caught:
        choose(template(ip="192.0.2.1"))
    assert caught.value.reason == "NoPort"
    assert "192.0.2.1" in caught.value.detail


def test_ipc_paths(choose, tmp_path):
    prefix = str(tmp_path / "k")
    with socket.socket(socket.AF_UNIX) as stale, socket.socket(socket.AF_UNIX) as taken:
        stale.bind(prefix + "-1")
        taken.bind(prefix + "-2")
        taken.listen()
        stale.close()
        ports = choose({"transport": "ipc", "ip": prefix})
        assert list(ports.numbers.values()) == [1, 3, 4, 5, 6]
        assert not os.path.exists(prefix + "-1")
        assert not accepts(ports, "shell_port")
        with socket.socket(socket.AF_UNIX) as kernel:
            kernel.bind(prefix + "-1")
            kernel.listen()
            assert accepts(ports, "shell_port")


def test_ipc_without_a_prefix_goes_to_the_private_folder(choose, tmp_path):
    assert choose({"transport": "ipc"}).ip == str(tmp_path / "ipc")


def test_ipc_paths_that_cannot_be(choose, tmp_path):
    for prefix in (str(tmp_path / ("x" * 120)), str(tmp_path / "nowhere" / "k")):
        with pytest.raises(StartError) as caught:
            choose({"transport": "ipc", "ip": prefix})
        assert caught.value.reason == "NoPort"


def test_an_ordinary_file_is_no_free_path(tmp_path):
    path = tmp_path / "file"
    path.write_text("precious")
    # connect() to an ordinary file is refused like one to a stale socket
    assert not path_is_free(str(path))
    assert path.exists()


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_private_files(tmp_path):
    old = os.umask(0)
    try:
        folder = files.create_folder(str(tmp_path / "a" / "b"), "k/../1 x", {})
        path = os.path.join(folder.path, "connection.json")
        files.write_private(path, "text")
    finally:
        os.umask(old)
    assert mode(tmp_path / "a" / "b") == mode(folder.path) == 0o700
    assert mode(path) == 0o600
    assert os.listdir(folder.path) == ["connection.json"]
    assert os.path.dirname(folder.path) == str(tmp_path / "a" / "b")
    folder.remove()
    assert os.listdir(tmp_path / "a" / "b") == []


def test_runtime_folder_choices(tmp_path):
    def base(option="", **environ):
        folder = files.create_folder(option, "k", environ)
        folder.remove()
        return os.path.dirname(folder.path)

    xdg, tmp = tmp_path / "xdg", tmp_path / "tmp"
    xdg.mkdir()
    tmp.mkdir()
    everything = {"XDG_RUNTIME_DIR": str(xdg), "TMPDIR": str(tmp)}
    assert base(str(tmp_path / "o"), GP_RUNTIME_DIR=str(tmp_path / "v"), **everything) == str(tmp_path / "o")
    assert base(GP_RUNTIME_DIR=str(tmp_path / "v"), **everything) == str(tmp_path / "v")
    assert base(**everything) == str(xdg / "gp")
    everything["XDG_RUNTIME_DIR"] = str(tmp_path / "nowhere")
    assert base(**everything) == str(tmp / f"gp-{os.geteuid()}")
    assert mode(tmp / f"gp-{os.geteuid()}") == 0o700


def test_a_runtime_folder_of_somebody_else_is_refused(tmp_path):
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    (tmp / f"gp-{os.geteuid()}").symlink_to(tmp_path)
    with pytest.raises(StartError) as caught:
        files.create_folder("", "k", {"TMPDIR": str(tmp)})
    assert caught.value.reason == "NoConnectionFile"
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(StartError) as caught:
        files.create_folder(str(open_to_all), "k", {})
    assert "others may write" in caught.value.detail


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
def test_a_runtime_folder_owned_by_another_user_is_refused(tmp_path):
    (tmp_path / f"gp-{os.geteuid()}").mkdir(0o700)
    os.chown(tmp_path / f"gp-{os.geteuid()}", 12345, 12345)
    with pytest.raises(StartError) as caught:
        files.create_folder("", "k", {"TMPDIR": str(tmp_path)})
    assert "belongs to user 12345" in caught.value.detail


def test_folders_of_killed_launchers_are_swept(tmp_path):
    alive = files.create_folder(str(tmp_path), "alive", {})
    dead = files.create_folder(str(tmp_path), "dead", {})
    files.write_private(os.path.join(dead.path, "connection.json"), "key")
    new = files.create_folder(str(tmp_path), "new", {})
    for folder in (dead, new):
        os.close(folder._descriptor)  # as the system does for a process that is killed
    (tmp_path / "notes").mkdir()
    for name in (alive.path, dead.path, tmp_path / "notes"):
        os.utime(name, (1, 1))
    cleanup.sweep(str(tmp_path))
    left = {entry.name.rpartition("-")[0] or entry.name for entry in tmp_path.iterdir()}
    assert left == {"alive", "new", "notes"}
    alive.remove()
