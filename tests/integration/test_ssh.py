"""gp-ssh with a real sshd: the contract, and ipykernels whose launchers call back through ssh."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import pytest
from clusters.availability import Unavailable, offer
from clusters.sshd import Sshd
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager
from support.answering import HostApplication, taken_over
from support.driven import Driven, driven
from support.installation import Installation, wait_until

from gp_core.cli import main
from gp_core.errors import GPError, LaunchDenied, LaunchFailed
from gp_core.runtime import runtime
from gp_core.testing import BackendContract
from gp_ssh.backend import SshBackend

pytestmark = [pytest.mark.timeout(300), pytest.mark.relay]


@pytest.fixture(scope="module")
def sshd() -> Iterator[Sshd]:
    """A running sshd; this machine is its host."""
    made = Sshd()
    try:
        offer("ssh", made.up)
        yield made
    finally:
        made.down()


# -- the contract


class TestContract(BackendContract):
    """Through one connection, which some tests break."""

    backend_class = SshBackend
    start_timeout, end_timeout, settle = 30.0, 15.0, 0.5

    unknown_job = {"note": {"kernel_id": "none", "pid": 2**22 + 1, "boot": "another", "started": 1}}

    @pytest.fixture(params=["dial", "ssh", "ssh by the user's own"])
    def backend_options(self, sshd: Sshd, request: pytest.FixtureRequest) -> dict[str, Any]:
        callback, _, own = request.param.partition(" ")
        options = {"remote_hosts": ["h1"], "ssh_config": str(sshd.config), "callback": callback}
        return {**options, "connector": "ssh" if own else "paramiko"}

    @pytest.fixture
    def break_platform(self, sshd: Sshd) -> Callable[[], AbstractContextManager[object]]:
        @contextlib.contextmanager
        def sshd_down() -> Iterator[None]:
            sshd.stop()
            try:
                yield
            finally:
                sshd.start()

        return sshd_down


# -- kernels


@pytest.fixture
def kernel(
    installation: Installation, sshd: Sshd, ipykernel_spec: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., AbstractContextManager[Driven]]:
    """Start an ipykernel on the host; the server's address cannot be reached from there."""
    monkeypatch.setenv("GP_RESPONSE_IP", "192.0.2.1")
    monkeypatch.setenv("GP_SSH_CONFIG", str(sshd.config))

    def started(
        *hosts: str, start: bool = True, argv: Sequence[str] = (), **more: Any
    ) -> AbstractContextManager[Driven]:
        spec = json.loads((ipykernel_spec / "kernel.json").read_text())
        config = {"remote_hosts": list(hosts or ("h1",)), **more}
        spec["argv"] = list(argv) or [sys.executable, *spec["argv"][1:]]
        spec["metadata"] = {"kernel_provisioner": {"provisioner_name": "distributed-provisioner", "config": config}}
        folder = installation.jupyter.data_dir / "kernels" / "far"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "kernel.json").write_text(json.dumps(spec))
        return driven(KernelManager(kernel_name="far"), start=start)

    return started


@pytest.fixture(params=["paramiko", "ssh"])
def connector(request: pytest.FixtureRequest, installation: Installation, sshd: Sshd) -> Iterator[str]:
    """Who connects; processes of ssh end with their connections."""
    yield request.param
    if request.param == "ssh":
        sshd.kill_sessions()


def test_a_life_through_ssh_alone(kernel: Callable[..., Any], connector: str) -> None:
    with kernel(connector=connector) as used:
        assert "127.0.0.1" in used.run("import os; x = 6; print(os.environ['SSH_CONNECTION'])")
        cell = used.start_cell("print('running', flush=True)\nwhile True: pass", "running")
        used.do(used.manager.interrupt_kernel())
        assert used.reply(cell)["ename"] == "KeyboardInterrupt"
        assert "42" in used.run("x * 7")
        used.restart()
        assert "NameError" in used.run("x")


def test_limits_hold_after_a_restart_too(kernel: Callable[..., Any]) -> None:
    processor = min(os.sched_getaffinity(0))
    with kernel(nice=3, cpu_affinity=str(processor), memory_limit="8Gi", load_balancing_algorithm="least-load") as used:
        for _ in range(2):
            assert used.run("import os; print(os.nice(0), os.sched_getaffinity(0))").strip() == f"3 {{{processor}}}"
            used.restart()


# -- other users

PLAIN_KERNEL = """
import json, os, socket, sys, time
info, kept = json.load(open(sys.argv[1])), []
for name in ("shell", "iopub", "stdin", "control", "hb"):
    ipc = info["transport"] == "ipc"
    kept.append(socket.socket(socket.AF_UNIX if ipc else socket.AF_INET))
    kept[-1].bind("%s-%d" % (info["ip"], info[name + "_port"]) if ipc else (info["ip"], info[name + "_port"]))
    kept[-1].listen()
with open(os.path.expanduser("~/who"), "w") as file:
    file.write("%d %d" % (os.getuid(), os.getpid()))
time.sleep(600)
"""


@pytest.fixture(scope="module")
def other() -> Iterator[pwd.struct_passwd]:
    """Another user of the host."""
    name = f"gpt{os.getpid()}"

    def made() -> pwd.struct_passwd:
        if shutil.which("sudo") is None:
            raise Unavailable("needs: apt-get install sudo")
        if os.geteuid() != 0:
            raise Unavailable("needs: root, to make a user")
        # a password that none is, because an sshd lets nobody in whose account is locked
        subprocess.run(["useradd", "--create-home", "--password", "*", name], check=True)
        return pwd.getpwnam(name)

    user = offer("sudo", made)
    try:
        yield user
    finally:
        subprocess.run(["pkill", "-KILL", "-u", name], check=False)  # the connection, if it logged in
        subprocess.run(["userdel", "--force", "--remove", name], check=False, capture_output=True)


@pytest.fixture
def as_user(kernel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Start a kernel as some user of the host; it needs the host's own Python only."""

    def started(name: str, **more: Any) -> AbstractContextManager[Driven]:
        monkeypatch.setenv("GP_IMPERSONATION_ENABLED", "1")
        monkeypatch.setenv("GP_USER_SOURCE", "env:GP_TEST_USER")
        monkeypatch.setenv("GP_TEST_USER", name)
        argv = ["/usr/bin/python3", "-c", PLAIN_KERNEL, "{connection_file}"]
        return cast(AbstractContextManager[Driven], kernel(start=False, argv=argv, **more))

    return started


def test_a_kernel_of_another_user(as_user: Callable[..., Any], other: pwd.struct_passwd) -> None:
    who = Path(other.pw_dir, "who")
    with as_user(other.pw_name) as used:
        used.do(used.manager.start_kernel())
        uid, pid = map(int, who.read_text().split())
        assert uid == other.pw_uid
        assert Path(f"/proc/{pid}").stat().st_uid == other.pw_uid
        assert Path(other.pw_dir, ".cache/gp").stat().st_uid == other.pw_uid
        assert used.alive
        assert used.manager.kernel_id in found()  # by a process that knows only the records
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not used.alive, 15)
        used.do(used.manager.restart_kernel(now=True))
        assert int(who.read_text().split()[1]) != pid
        used.do(used.manager.shutdown_kernel(now=True))
    wait_until(lambda: not processes_of(other.pw_uid), 15)


def found() -> list[str]:
    """Kernels that are discovered on the host."""
    backend = SshBackend(remote_hosts=["h1"], ssh_config=os.environ["GP_SSH_CONFIG"])
    return [handle["kernel_id"] for handle in runtime().submit(backend.discover()).result(30)]


def test_a_kernel_of_who_logs_in(
    as_user: Callable[..., Any], other: pwd.struct_passwd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GP_REMOTE_USER", "{username}")
    who = Path(other.pw_dir, "who")
    who.unlink(missing_ok=True)
    with as_user(other.pw_name) as used:
        used.do(used.manager.start_kernel())
        assert int(who.read_text().split()[0]) == other.pw_uid
        assert not [line for line in processes_of(0) if "sudo" in line and other.pw_name in line]
        assert used.manager.kernel_id in found()
        used.do(used.manager.shutdown_kernel(now=True))
    with (
        pytest.raises(LaunchFailed, match="UserProhibited"),
        as_user(other.pw_name, prohibited_uids=[other.pw_uid]) as used,
    ):
        used.do(used.manager.start_kernel())
    for hostile in ("-oProxyCommand=x", "a b", "a@h9"):
        with pytest.raises(GPError, match=r"cannot be a user|not acceptable"), as_user(hostile) as used:
            used.do(used.manager.start_kernel())
    wait_until(lambda: not processes_of(other.pw_uid), 15)


def processes_of(uid: int) -> list[str]:
    """Return the command lines of a user's processes but those of the connection that is kept."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == uid:
                found.append((entry / "cmdline").read_text())
    return [line for line in found if not line.startswith("sshd:")]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gp-nobody-of-that-name", "ImpersonationFailed"),
        ("root", "unauthorized_users"),
        ("$(touch canary)", "cannot be a user"),
        ("a b", "cannot be a user"),
    ],
)
def test_users_that_no_kernel_may_run_as(
    as_user: Callable[..., Any], other: pwd.struct_passwd, name: str, reason: str
) -> None:
    with pytest.raises((LaunchFailed, LaunchDenied), match=reason), as_user(name) as used:
        used.do(used.manager.start_kernel())


def test_who_logs_in_is_no_exception(
    as_user: Callable[..., Any], other: pwd.struct_passwd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GP_REMOTE_USER", "root")
    monkeypatch.setenv("GP_UNAUTHORIZED_USERS", "nobody")
    with pytest.raises(LaunchFailed, match="UserProhibited"), as_user("root") as used:
        used.do(used.manager.start_kernel())


def test_a_user_whose_number_is_prohibited(as_user: Callable[..., Any], other: pwd.struct_passwd) -> None:
    with (
        pytest.raises(LaunchFailed, match="UserProhibited"),
        as_user(other.pw_name, prohibited_uids=[other.pw_uid]) as used,
    ):
        used.do(used.manager.start_kernel())
    assert not processes_of(other.pw_uid)


# -- other hosts


@pytest.mark.parametrize("host", ["h2", "h3", "proxied"])
def test_a_host_behind_others(kernel: Callable[..., Any], sshd: Sshd, host: str, connector: str) -> None:
    with kernel(host, connector=connector) as used:
        assert "42" in used.run("6 * 7")
    sshd.kill_sessions()  # what ProxyCommand has started ends with its connection


def test_a_kernel_that_was_discovered(kernel: Callable[..., Any], installation: Installation) -> None:
    place = Path(pwd.getpwuid(os.getuid()).pw_dir, f"gp-test-{os.getpid()}")  # of the host, which is this machine
    place.symlink_to(sys.prefix)
    try:
        with kernel(start=False):  # makes the configuration
            assert main(["install", "ssh", "--host", "h1", "--discover", f"h1-{place.name}"]) == 0
        with driven(KernelManager(kernel_name=f"h1-{place.name}")) as used:
            assert "127.0.0.1" in used.run("import os; print(os.environ['SSH_CONNECTION'])")
            assert str(place) in used.run("import sys; print(sys.executable)")
    finally:
        place.unlink()
    assert main(["install", "ssh", "--refresh"]) == 0
    assert f"h1-{place.name}" not in KernelSpecManager().find_kernel_specs()


def test_a_killed_servers_kernel_is_taken_over(kernel: Callable[..., Any], installation: Installation) -> None:
    with kernel(start=False) as used:  # makes the kernelspec
        taken_over(installation, used, "far", "5f1c9a52-0000-4000-8000-000000000005")


def test_kernels_of_other_servers_count(kernel: Callable[..., Any], installation: Installation) -> None:
    with kernel("h1", start=False):  # makes the kernelspec
        pass
    others = [HostApplication(installation, "MappingKernelManager") for _ in range(2)]
    for number, one in enumerate(others):
        one.ask(f"start 5f1c9a52-0000-4000-8000-00000000000{number} far")
    pids = [handle["note"]["pid"] for handle in recorded()]
    others[0].end()  # its kernel runs on
    for expected in (2, 0):
        backend = SshBackend(remote_hosts=["h1", "h2"], ssh_config=os.environ["GP_SSH_CONFIG"])
        assert runtime().submit(backend._others()).result(30)["h1"] == expected
        if expected:
            with kernel("h1", "h2", load_balancing_algorithm="least-connection") as used:
                assert {handle["host"] for handle in recorded() if handle["kernel_id"] == used.manager.kernel_id} == {
                    "h2"
                }
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids), 15)
    others[1].end()
    assert main(["gc"]) == 0


def recorded() -> list[dict[str, Any]]:
    return runtime().submit(SshBackend().recorded()).result(30)


@pytest.mark.parametrize(
    ("callback", "told"),
    [
        ("auto", ["ok ssh host h1", "cannot dial 192.0.2.1:", "calls through ssh", "connected 0."]),
        ("dial", ["BAD ssh host h1", "cannot dial 192.0.2.1:", "or use callback: ssh"]),
    ],
)
def test_doctor_tries_both_ways_back(
    kernel: Callable[..., Any],
    installation: Installation,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    callback: str,
    told: list[str],
) -> None:
    with kernel(callback=callback, start=False):
        capsys.readouterr()
        assert main(["doctor", "far"]) == 1  # the server's address is none of this machine's
    said = " ".join(capsys.readouterr().out.split())
    assert [text for text in told if text not in said] == [], said


def test_no_line_is_lost_when_sessions_of_the_sshd_are_killed(
    kernel: Callable[..., Any], sshd: Sshd, connector: str
) -> None:
    with kernel(connector=connector) as used:
        code = "import time\nfor n in range(60):\n    print(n, flush=True)\n    time.sleep(0.1)"
        cell = used.start_cell(code, "0")
        for _ in range(2):
            resumes = used.manager.provisioner._kernel.relay.resumes
            sshd.kill_sessions()
            wait_until(lambda before=resumes: used.manager.provisioner._kernel.relay.resumes > before, 30)
        assert used.output(cell).split() == [str(n) for n in range(1, 60)]


def test_a_connection_that_a_person_has_opened(kernel: Callable[..., Any], sshd: Sshd, tmp_path: Path) -> None:
    """As after a one-time password, which no program can know; it stays open in the end."""
    before, shared = sshd.config.read_text(), f"{tmp_path}/shared"
    by_hand = ["ssh", "-F", str(sshd.config), "-i", f"{sshd.folder}/id", "-S", shared]
    master = subprocess.Popen([*by_hand, "-M", "-N", "h1"], env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]})
    try:
        wait_until(Path(shared).exists, 10)
        text = before.replace(f"{sshd.folder}/id", f"/nowhere/id\n ControlPath {shared}")
        sshd.config.write_text(text.replace("Host h1", "Host h6 h1"))
        with kernel("h6", connector="ssh") as used:
            assert "42" in used.run("6 * 7")
        assert master.poll() is None
    finally:
        sshd.config.write_text(before)
        master.kill()
        master.wait()


def test_a_host_that_cannot_be_reached_is_passed_over(kernel: Callable[..., Any]) -> None:
    for _ in range(2):
        with kernel("127.0.0.1:1", "h1") as used:
            assert "42" in used.run("6 * 7")


def test_without_a_key_the_reason_is_told(kernel: Callable[..., Any], sshd: Sshd, connector: str) -> None:
    before = sshd.config.read_text()
    try:
        sshd.config.write_text(before.replace(f"{sshd.folder}/id", "/nowhere/id").replace("Host h1", "Host h5 h1"))
        with (
            pytest.raises(LaunchFailed, match="AuthenticationFailed"),
            kernel("h5", start=False, connector=connector) as used,
        ):
            used.start()
    finally:
        sshd.config.write_text(before)


def test_a_host_key_that_nobody_knows_is_refused(kernel: Callable[..., Any], sshd: Sshd, connector: str) -> None:
    known = sshd.folder / "known_hosts"
    kept = known.read_text()
    other = (sshd.folder / "id.pub").read_text().split()
    try:
        for text, reason in (
            ("", "HostKeyUnknown"),
            (f"[127.0.0.1]:{sshd.port} {other[0]} {other[1]}\n", "HostKeyChanged"),
        ):
            known.write_text(text)
            sshd.kill_sessions()
            with pytest.raises(LaunchFailed, match=reason), kernel(start=False) as used:
                used.start()
    finally:
        known.write_text(kept)
