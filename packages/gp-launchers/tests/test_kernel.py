"""The kernel as the launcher starts, watches and ends it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launcher_kit import CONNECTION, TOKEN, alive, eventually

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def test_start_in_every_detail(launch, server):
    running = launch(
        "mode",
        options=("--log-file", str(launch.folder / "log")),
        env={"EXTRA": "${BASE}/x"},
        environ={"BASE": "/far", "JPY_PARENT_PID": "1234"},
    )
    connection, hello = server.meet()
    assert hello.pop("secret")
    assert hello.pop("python").startswith("3.")
    ports = hello.pop("ports")
    assert hello == {
        "type": "hello",
        "versions": [2],
        "kernel_id": "kernel-1",
        "token": TOKEN,
        "launcher": "0.1.0",
        "host": socket.gethostname(),
        "pid": running.pid,
        "capabilities": ["relay", "signal", "restart"],
        "relay": {"id": None, "received": 0},
        "run": 1,
    }
    listening = connection.next("listening")
    told = running.kernel()
    assert listening == {"type": "listening", "run": 1, "pid": told["pid"], "ports": ports}
    assert told["info"] == {**CONNECTION, **listening["ports"]}
    assert told["mode"] == 0o600
    assert told["folder_mode"] == 0o700
    assert told["path"].startswith(str(launch.runtime))
    assert told["env"]["EXTRA"] == "/far/x"
    assert told["env"]["KERNEL_ID"] == "kernel-1"
    assert told["env"]["JPY_PARENT_PID"] == str(running.pid)
    assert told["pgid"] == told["pid"]
    assert told["fds"] == ["0", "1", "2", "3", "4"]  # 3 and 4 are this report and the listing itself
    status = dict(line.split(":\t") for line in told["status"].splitlines() if ":\t" in line)
    assert int(status["SigBlk"], 16) == 0
    assert int(status["SigIgn"], 16) & ~(1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1) == 0  # Python's own

    # The token is nowhere but in the session.
    assert "GP_LAUNCH_SECRETS" not in told["env"]
    assert TOKEN not in json.dumps(told)
    for pid in (running.pid, told["pid"]):
        with open(f"/proc/{pid}/cmdline", "rb") as cmdline:
            assert TOKEN.encode() not in cmdline.read()
    log = (launch.folder / "log").read_text()
    assert "listening" in log
    assert TOKEN not in log + running.log
    assert CONNECTION["key"] not in log + running.log
    assert os.stat(launch.folder / "log").st_mode & 0o777 == 0o600

    connection.send(type="shutdown", grace=5)
    exited = connection.next("exited")
    assert (exited["run"], exited["code"], exited["listened"], exited["reason"]) == (1, -15, True, None)
    assert running.wait() == 0
    assert not alive(told["pid"])
    assert list(launch.runtime.iterdir()) == []


def test_a_background_job_of_a_shell_gives_its_kernel_default_signals(launch, server):
    def ignore():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])

    running = launch(preexec_fn=ignore)
    status = running.kernel()["status"]
    assert "SigBlk:\t0000000000000000" in status
    ignored = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigIgn"))
    assert not ignored & 1 << signal.SIGINT - 1


def test_descriptors_of_the_caller_do_not_reach_the_kernel(launch, server, tmp_path):
    with open(tmp_path / "open", "w") as file:
        running = launch(pass_fds=(file.fileno(),))
        assert running.kernel()["fds"] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("ip", ["0.0.0.0", "::1"])
def test_other_addresses(launch, server, ip):
    running = launch(connection={"ip": ip})
    connection, _ = server.meet()
    connection.next("listening")
    assert running.kernel()["info"]["ip"] == ip


def test_ipc(launch, server, tmp_path):
    running = launch(connection={"transport": "ipc", "ip": str(tmp_path / "k")})
    connection, _ = server.meet()
    assert connection.next("listening")["ports"]["hb_port"] == 5
    running.kernel()
    connection.send(type="restart", run=2)
    assert connection.next("listening")["ports"]["hb_port"] == 5


def test_a_port_range(launch, server):
    launch(options=("--port-range", "23000..23900"))
    connection, _ = server.meet()
    assert all(23000 <= port <= 23900 for port in connection.next("listening")["ports"].values())


def test_listening_is_not_said_before_it_is_true(launch, server):
    begin = time.monotonic()
    launch("late")
    connection, _ = server.meet()
    assert time.monotonic() - begin < 0.5
    assert connection.next("listening")
    assert time.monotonic() - begin > 0.5


def test_restart_in_place(launch, server, tmp_path):
    running = launch("first")
    connection, _ = server.meet()
    first = connection.next("listening")
    before = running.kernel()
    assert before["argv"][-1] == "first"

    connection.send(type="restart", run=2, env=None, argv=None, cwd=None)
    second = connection.next("listening")  # and no `exited` of the run that was killed
    assert not alive(before["pid"])
    after = running.kernel()
    assert second["run"] == 2
    assert second["ports"] == first["ports"]
    assert after["info"] == before["info"]
    assert after["pid"] != before["pid"]

    env = {"KERNEL_OUT": str(running.out_path), "NEW": "1"}
    argv = [sys.executable, "-I", "-S", str(launch.script), "{connection_file}", "third"]
    connection.send(type="restart", run=3, env=env, argv=argv, cwd=str(tmp_path), unknown=[1])
    assert connection.next("listening")["run"] == 3
    third = running.kernel()
    assert third["argv"][-1] == "third"
    assert third["env"]["NEW"] == "1"
    assert third["cwd"] == str(tmp_path)
    assert third["info"] == before["info"]

    for run in (3, 2, "4", None, True):
        connection.send(type="restart", run=run, env=None, argv=None, cwd=None)
    connection.send(type="restart", run=5, argv="not a list")
    assert connection.silent(0.3)
    assert alive(third["pid"])


def test_restart_after_an_exit_keeps_the_ports(launch, server):
    running = launch("brief", "1", "7")  # deletes its connection file, as ipykernel does
    connection, _ = server.meet()
    ports = connection.next("listening")["ports"]
    assert connection.next("exited")["code"] == 7
    for _ in range(3):  # nobody else gets them meanwhile
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", ports["shell_port"]))
    connection.send(type="restart", run=2)
    listening = connection.next("listening")
    assert (listening["run"], listening["ports"]) == (2, ports)
    assert connection.next("exited")["run"] == 2
    connection.send(type="shutdown", grace=1)
    assert running.wait() == 7


def test_the_last_of_several_restarts_counts(launch, server):
    launch()
    connection, _ = server.meet()
    connection.next("listening")
    for run in (2, 3, 4):
        connection.send(type="restart", run=run)
    listening = connection.next("listening")
    while listening["run"] < 4:
        listening = connection.next("listening")
    assert connection.silent(0.3)


def test_a_kernel_that_dies_tells_its_last_words(launch, server):
    running = launch("die", options=("--log-file", str(launch.folder / "log")))
    connection, _ = server.meet()
    exited = connection.next("exited")
    assert (exited["code"], exited["listened"], exited["reason"]) == (3, False, None)
    assert exited["stderr"].endswith("the last words")
    assert len(exited["stderr"]) == 8192
    connection.send(type="shutdown", grace=1)
    assert running.wait() == 3
    assert (launch.folder / "log").read_text().count("x") >= 20000


def test_a_kernel_killed_by_a_signal(launch, server):
    running = launch()
    connection, _ = server.meet(linger=0.2)
    pid = connection.next("listening")["pid"]
    os.kill(pid, signal.SIGSEGV)
    assert connection.next("exited")["code"] == -signal.SIGSEGV
    assert running.wait() == 128 + signal.SIGSEGV


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["no-such-command-at-all"], "no-such-command-at-all: command not found"),
        (["/no/such/file"], "/no/such/file: No such file"),
        (["/etc/passwd"], "Permission denied"),
    ],
)
def test_command_not_found(launch, server, argv, text):
    running = launch(command=[*launch.command(None), "--", *argv, "{connection_file}"])
    connection, _ = server.meet()
    exited = connection.next("exited")
    assert (exited["code"], exited["reason"], exited["listened"]) == (127, "CommandNotFound", False)
    assert text.lower() in exited["detail"].lower()
    fixed = [sys.executable, "-I", "-S", str(launch.script), "{connection_file}"]
    connection.send(type="restart", run=2, argv=fixed)
    assert connection.next("listening")["run"] == 2
    connection.send(type="shutdown", grace=0)
    assert running.wait() == 0


def test_the_command_is_looked_up_in_the_kernels_path(launch, server, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "my-kernel").symlink_to(launch.script)
    launch.script.write_text(f"#!{sys.executable}\n" + launch.script.read_text())
    launch.script.chmod(0o755)
    launch(
        command=[*launch.command(None), "--", "my-kernel", "{connection_file}"],
        env={"PATH": f"{tmp_path}/bin:${{PATH}}"},
    )
    connection, _ = server.meet()
    connection.next("listening")


def test_no_port(launch, server):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        running = launch(options=("--port-range", f"{port}..{port}"))
        connection, _ = server.meet()
        exited = connection.next("exited")
        assert exited["reason"] == "NoPort"
        assert str(port) in exited["detail"]
        connection.send(type="shutdown", grace=0)
        assert running.wait() == 69


def test_no_connection(launch, server):
    running = launch(secrets={"token": TOKEN})
    connection, _ = server.meet(linger=0.1)
    assert connection.next("exited")["reason"] == "NoConnectionFile"
    assert running.wait() == 78


def test_a_runtime_folder_that_cannot_be_written(launch, server):
    running = launch(options=("--runtime-dir", "/proc/self/gp"))
    connection, _ = server.meet(linger=0.1)
    exited = connection.next("exited")
    assert exited["reason"] in ("NoSpace", "NoConnectionFile")
    assert "/proc/self/gp" in exited["detail"]
    assert running.wait() == exited["code"]


@linux
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
@pytest.mark.parametrize("options", ["size=4k,nr_inodes=2", "ro"])
def test_disk_full_and_read_only(launch, server, tmp_path, options):
    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"mode=0700,{options}", "gp", tmp_path / "disk"], check=False
    )
    if mounted.returncode:
        pytest.skip("this container may not mount")
    try:
        running = launch(options=("--runtime-dir", str(tmp_path / "disk")))
        connection, _ = server.meet(linger=0.1)
        exited = connection.next("exited")
        assert exited["reason"] == "NoSpace", exited
        assert running.wait() == 73
    finally:
        subprocess.run(["umount", "-l", tmp_path / "disk"], check=True)


def test_cwd(launch, server, tmp_path):
    (tmp_path / "work").mkdir()
    assert launch(options=("--cwd", str(tmp_path / "work"))).kernel()["cwd"] == str(tmp_path / "work")
    lost = launch(options=("--cwd", "/no/such/folder"), environ={"HOME": str(tmp_path)})
    assert lost.kernel()["cwd"] == str(tmp_path)
    eventually(lambda: "/no/such/folder does not exist here" in lost.log)


def test_ports_taken_between_choice_and_bind(launch, server, tmp_path):
    """A kernel that does not set SO_REUSEADDR cannot have held ports: it gets others that nobody holds."""
    launch("plain")
    connection, _ = server.meet()
    assert connection.next("listening")["run"] == 1
    connection.send(type="restart", run=2)
    assert connection.next("listening")["run"] == 2


def test_signals_go_to_the_whole_group(launch, server):
    running = launch("child")
    connection, _ = server.meet()
    connection.next("listening")
    child = int((launch.folder / "out-0.child").read_text())
    connection.send(type="signal", signum="INT")
    connection.send(type="signal", signum=0)
    connection.send(type="signal")
    connection.send(type="signal", signum=int(signal.SIGKILL))
    assert connection.next("exited")["code"] == -9
    eventually(lambda: not alive(child))
    connection.send(type="signal", signum=9)  # to a dead kernel: nothing
    assert connection.silent(0.1)
    assert running.process.poll() is None


def test_signals_of_the_launcher_are_forwarded(launch, server):
    running = launch("signals")
    eventually((launch.folder / "out-0.ready").exists)
    connection, _ = server.meet()
    connection.next("listening")
    numbers = [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT]
    told = launch.folder / "out-0.signals"
    for count, number in enumerate(numbers, 1):
        os.kill(running.pid, number)
        eventually(lambda count=count: told.exists() and told.read_text().count("\n") == count)
    assert told.read_text().split() == [str(int(number)) for number in numbers]
    connection.send(type="signal", signum=int(signal.SIGINT))
    eventually(lambda: told.read_text().count("\n") == 6)


def test_sigterm_ends_kernel_and_launcher(launch, server):
    running = launch()
    connection, _ = server.meet()
    connection.next("listening")
    kernel = running.kernel()["pid"]
    running.process.terminate()
    assert connection.next("exited")["code"] == -15
    assert running.wait() == 143
    assert not alive(kernel)
    assert list(launch.runtime.iterdir()) == []


def test_sigterm_before_anybody_handles_it_leaves_nothing(launch, server):
    running = launch()
    while not (launch.runtime.exists() and any(launch.runtime.iterdir())):
        pass  # the moment is short
    running.process.terminate()
    assert running.wait() == 143
    assert list(launch.runtime.iterdir()) == []


def test_sigterm_without_a_server(launch, server):
    server.stop()
    running = launch()
    running.kernel()
    time.sleep(0.3)
    running.process.terminate()
    assert running.wait() == 143


def test_a_stubborn_kernel_is_killed_after_the_grace(launch, server):
    running = launch("stubborn", tuned=("supervisor.GRACE = 0.3",))
    eventually((launch.folder / "out-0.ready").exists)
    connection, _ = server.meet()
    connection.next("listening")
    begin = time.monotonic()
    running.process.terminate()
    assert connection.next("exited")["code"] == -9
    assert time.monotonic() - begin > 0.25
    assert running.wait() == 137


def test_shutdown_without_grace_kills(launch, server):
    running = launch("stubborn")
    eventually((launch.folder / "out-0.ready").exists)
    connection, _ = server.meet()
    connection.next("listening")
    connection.send(type="shutdown", grace=0)
    assert connection.next("exited")["code"] == -9
    assert running.wait() == 0


def test_children_of_a_dead_kernel_end_with_the_launcher(launch, server):
    running = launch("child")
    connection, _ = server.meet()
    kernel = connection.next("listening")["pid"]
    told = launch.folder / "out-0.child"
    eventually(lambda: told.exists() and told.read_text())
    child = int(told.read_text())
    os.kill(kernel, signal.SIGKILL)
    connection.next("exited")
    assert alive(child)  # a user's background process may outlive a crash, as it does locally
    connection.send(type="shutdown", grace=0)
    running.wait()
    eventually(lambda: not alive(child))


@linux
@pytest.mark.parametrize("when", ["started", "accepted"])
def test_a_killed_launcher_takes_its_kernel_along(launch, server, when):
    running = launch()
    if when == "accepted":
        connection, _ = server.meet()
        connection.next("listening")
    kernel = running.kernel()["pid"]
    running.process.kill()
    eventually(lambda: not alive(kernel), 2)


@linux
def test_the_next_launcher_removes_the_key_of_a_killed_one(launch, server):
    running = launch()
    left = os.path.dirname(running.kernel()["path"])
    running.process.kill()
    running.wait()
    os.utime(left, (1, 1))
    after = launch("brief", "0.05", "0")
    while (server.next().messages.get(timeout=10) or {}).get("pid") != after.pid:
        pass  # the killed one may have got to the handshake or to its hello
    server.stop()
    after.wait()
    assert list(launch.runtime.iterdir()) == []


@linux
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare")
def test_pid_1_reaps_orphans_and_forwards(launch, server, tmp_path):
    script = tmp_path / "orphans.py"
    script.write_text(
        "import os, sys, time\n"
        "for _ in range(5):\n"
        "    if os.fork() == 0:\n"
        "        if os.fork() == 0:\n"
        "            time.sleep(0.2)\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
        "sys.argv = sys.argv[1:]\n"
        "exec(open(sys.argv[0]).read())\n"
    )
    probe = subprocess.run(["unshare", "--pid", "--fork", "true"], check=False, capture_output=True)
    if probe.returncode:
        pytest.skip("this container may not unshare")
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *launch.command(None), "--"]
    command += [sys.executable, str(script), str(launch.script), "{connection_file}"]
    running = launch(command=command)
    connection, hello = server.meet()
    assert hello["pid"] == 1
    connection.next("listening")
    outer = int(Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()[0])
    children = Path(f"/proc/{outer}/task/{outer}/children")
    eventually(lambda: len(children.read_text().split()) == 1)  # the kernel alone: the orphans are reaped
    os.kill(outer, signal.SIGTERM)
    assert connection.next("exited")["code"] == -15
    assert running.wait() == 143


def test_attach(launch, server, tmp_path):
    file = tmp_path / "attached.json"
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, start_new_session=True
    ) as caller:
        command = [*launch.command(None), "--attach", str(caller.pid), "--connection-file", str(file)]
        running = launch(command=command)
        connection, hello = server.meet()
        assert hello["capabilities"] == ["relay", "signal"]
        eventually(file.exists)
        assert os.stat(file).st_mode & 0o777 == 0o600
        env = {**os.environ, "KERNEL_OUT": str(running.out_path)}
        with subprocess.Popen([sys.executable, str(launch.script), str(file)], env=env) as kernel:
            listening = connection.next("listening")
            assert listening["pid"] == caller.pid
            assert running.kernel()["info"] == {**CONNECTION, **listening["ports"]}
            connection.send(type="restart", run=2)  # cannot
            connection.send(type="signal", signum=int(signal.SIGTERM))
            exited = connection.next("exited")
            assert (exited["code"], exited["run"], exited["listened"]) == (None, 1, True)
            assert running.wait() == 0
            assert not file.exists()
            kernel.kill()


@pytest.mark.parametrize("pidfd", [True, False])
def test_attach_sees_a_zombie_and_shuts_down(launch, server, tmp_path, pidfd):
    with subprocess.Popen(["sleep", "600"]) as caller:  # nobody waits for it: it becomes a zombie
        options = ("--attach", str(caller.pid), "--connection-file", str(tmp_path / "f"))
        without = "import os; os.__dict__.pop('pidfd_open', None)"
        command = launch.command(None, options, launch.tuned("pass" if pidfd else without))
        running = launch(command=command)
        connection, _ = server.meet()
        connection.send(type="shutdown", grace=5)
        assert connection.next("exited")["code"] is None
        assert running.wait() == 0


def test_attach_to_a_process_that_is_gone(launch, server, tmp_path):
    with subprocess.Popen(["true"]) as caller:
        caller.wait()
    options = ("--attach", str(caller.pid), "--connection-file", str(tmp_path / "f"))
    running = launch(command=launch.command(None, options))
    connection, _ = server.meet()
    assert connection.next("exited")["code"] is None
    assert running.wait() == 0


def test_an_endless_writer_stops_nobody(launch, server):
    """Nobody reads the launcher's standard error: what does not fit is dropped, the kernel goes on."""
    read, write = os.pipe()
    code = "import os, sys\nwhile True: os.write(2, b'y' * 65536)"
    command = [*launch.command(None), "--", sys.executable, "-c", code, "{connection_file}"]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(launch_sources()), "GP_LAUNCH_SECRETS": secrets_text()},
        stderr=write,
    )
    try:
        os.close(write)
        connection, _ = server.meet()
        time.sleep(0.5)
        connection.send(type="ping", n=1)
        assert connection.next("pong")["n"] == 1
        connection.send(type="shutdown", grace=0)
        assert connection.next("exited")["stderr"] == "y" * 8192
        assert process.wait(10) == 0
    finally:
        os.close(read)
        process.kill()
        process.wait()


def launch_sources():
    from launcher_kit import SOURCES

    return SOURCES


def secrets_text():
    return json.dumps({"token": TOKEN, "connection": CONNECTION})
