"""gp-docker with a real engine: the contract, and ipykernels in containers of an image that knows nothing of gp."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import nbformat
import pytest
from clusters.docker import IMAGE, Engine, hides_ports
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager, KernelManager
from nbclient import NotebookClient
from support.answering import taken_over
from support.boxed import KERNEL, Boxed, inspected
from support.driven import driven
from support.installation import Installation, wait_until

from gp_core.cli import main
from gp_core.errors import GPError, LaunchFailed
from gp_core.server import data_folder
from gp_core.testing import BackendContract
from gp_docker.backend import DockerBackend

pytestmark = [pytest.mark.timeout(300), pytest.mark.relay]


class TestContract(BackendContract):
    """On one engine, which is killed in some tests."""

    backend_class = DockerBackend
    python = "python3"
    waivers: ClassVar = (
        {"test_kernel_gets_its_environment_and_can_be_reached": "the engine lets nobody else reach its kernels' ports"}
        if hides_ports()
        else {}
    )
    start_timeout, end_timeout, settle = 30.0, 15.0, 0.5

    unknown_job = {"container": "0" * 64}

    @pytest.fixture
    def backend_options(self, engine: Engine) -> dict[str, Any]:
        return {"engine": engine.url, "image_name": IMAGE}

    @pytest.fixture
    def break_platform(self, engine: Engine) -> Callable[[], AbstractContextManager[object]]:
        @contextlib.contextmanager
        def killed() -> Iterator[None]:
            engine.kill_daemon()
            try:
                yield
            finally:
                engine.start_daemon()

        return killed


# -- kernels


def test_a_life(boxed: Boxed, engine: Engine, channels: str) -> None:
    with boxed(memory="512Mi", cpus="1.5") as used:
        assert "1000 100" in used.run("import os; x = 6; print(os.getuid(), os.getgid())")
        assert used.run("import socket; print(socket.gethostname())").strip() in inspected(engine, used)["Id"]
        assert "sha256:" in used.run("print(os.environ['GP_KERNEL_IMAGE_DIGEST'])")
        assert "[]" in used.run("print([name for name in os.listdir('/.gp/kernel') if name == 'secrets'])")
        cell = used.start_cell("print('running', flush=True)\nwhile True: pass", "running")
        used.do(used.manager.interrupt_kernel())
        assert used.reply(cell)["ename"] == "KeyboardInterrupt"
        assert "42" in used.run("x * 7")
        before = inspected(engine, used)["Id"]
        used.restart()
        assert inspected(engine, used)["Id"] == before
        assert "NameError" in used.run("x")


def test_nothing_secret_is_to_be_seen_and_little_is_allowed(boxed: Boxed, engine: Engine) -> None:
    with boxed(memory="512Mi", cpus="500m", shm_size="128Mi") as used:
        told = inspected(engine, used)
        seen, host = json.dumps(told), told["HostConfig"]
        record = json.loads(next((used_records()).glob("*.json")).read_text())
        key = used.manager.session.key.decode()
        assert key not in seen
        assert "GP_LAUNCH_SECRETS" not in seen
        assert record["handle"]["digest"].rpartition("@")[2].startswith("sha256:")
        assert (host["CapDrop"], host["Privileged"], host["SecurityOpt"]) == (["ALL"], False, ["no-new-privileges"])
        assert (host["Memory"], host["NanoCpus"], host["ShmSize"]) == (2**29, 5 * 10**8, 2**27)
        assert host["Init"]
        assert "NoNewPrivs:\t1" in used.run("print(open('/proc/self/status').read())")
        assert "CapEff:\t0000000000000000" in used.run("print(open('/proc/self/status').read())")


def test_ports_that_a_firewall_closes_are_told(boxed: Boxed, engine: Engine) -> None:
    closed = ["FORWARD", "-o", "docker0", "-m", "conntrack", "--ctstate", "NEW", "-j", "DROP"]
    engine.network("iptables", "-I", *closed)
    try:
        said = r"this machine cannot connect to.*\[KernelUnreachable\]"
        with boxed(start=False, channels="direct") as used, pytest.raises(LaunchFailed, match=said):
            used.do(used.manager.start_kernel())
        with boxed(channels="relay") as used:
            assert "42" in used.run("6 * 7")
    finally:
        engine.network("iptables", "-D", *closed)


def used_records() -> Path:
    return data_folder() / "kernels"


@pytest.mark.parametrize(
    ("lines", "config", "expected"),
    [
        (["USER jovyan"], {}, "1000 100 /home/jovyan"),
        (["USER 1000"], {}, "1000 100 /home/jovyan"),
        (["USER 4711"], {}, "4711 100 /.gp/kernel/home"),
        ([], {"user": "jovyan:data"}, "1000 2000 /home/jovyan"),
        ([], {"uid": "1234", "gid": "0x64"}, "1234 100 /.gp/kernel/home"),
        ([], {"read_only": True}, "1000 100 /home/jovyan"),
        (['ENTRYPOINT ["/usr/bin/env", "ENTERED=1"]'], {}, "1000 100 /home/jovyan 1"),
        (['ENTRYPOINT ["/usr/bin/false"]'], {"entrypoint": "replace"}, "1000 100 /home/jovyan"),
        (["WORKDIR /work", "HEALTHCHECK CMD false"], {"working_dir": "/tmp"}, "1000 100 /home/jovyan"),
    ],
)
def test_images_of_all_sorts(
    boxed: Boxed, engine: Engine, lines: list[str], config: dict[str, Any], expected: str
) -> None:
    name = engine.image(f"k{abs(hash(tuple(lines)))}", *lines) if lines else IMAGE
    with boxed(image_name=name, **config) as used:
        code = "import os; print(os.getuid(), os.getgid(), os.path.expanduser('~'), os.environ.get('ENTERED', ''))"
        assert used.run(code).strip() == expected
        if config.get("read_only"):
            assert "OSError" in used.run("open('/work/x', 'w')")


def test_a_link_of_an_image_leads_no_mount_to_the_launcher(boxed: Boxed, engine: Engine) -> None:
    """Else the engine would give the folder that is mounted there to the kernel's user."""
    image = engine.image("link", "RUN ln -s /.gp/kernel /m")
    with (
        boxed(start=False, image_name=image, volumes=["gp-test-link:/m"]) as used,
        pytest.raises(LaunchFailed, match="something is mounted"),
    ):
        used.do(used.manager.start_kernel())
    with engine.client() as client:
        wait_until(lambda: not client.containers(all=True, filters={"volume": "gp-test-link"}), 15)
        client.remove_volume("gp-test-link")


def test_a_killed_and_a_starved_kernel(boxed: Boxed, engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with boxed(memory="256Mi") as used:
        used.client.execute("x = bytearray(10**9); x[::4096] = b'1' * len(x[::4096])")
        wait_until(lambda: not used.alive, 30)
        assert used.exit_code == -9
        assert "used up its memory" in caplog.text
        used.restart()
        with engine.client() as client:
            client.kill(inspected(engine, used)["Id"])
        began = time.monotonic()
        wait_until(lambda: not used.alive, 10)
        assert time.monotonic() - began < 2
        used.do(used.manager.restart_kernel(now=True))  # in a new container
        used.ready()
        assert "42" in used.run("6 * 7")


@pytest.mark.parametrize(
    ("config", "reason", "said"),
    [
        ({"image_name": "127.0.0.1:5000/none:1"}, "RegistryUnreachable", "pull image"),
        ({"image_name": "127.0.0.1:5000/none:1", "pull_policy": "never"}, "ImageNotFound", "pull_policy is never"),
        ({"python": "python4"}, "CommandNotFound", "python4"),
        ({"networks": ["nowhere"]}, "NoSuchNetwork", "nowhere"),
        ({"gpus": "all"}, "NoSuchDevice", "gpu"),
        ({"user": "nobody-here"}, None, "uid 'nobody-here'"),
        ({"user": "root"}, None, "prohibited_uids"),
        ({"uid": "0x0"}, None, "prohibited_uids"),
        ({"gid": "00"}, None, "prohibited_gids"),
        ({"volumes": ["/etc:/mnt"]}, None, "allowed_volumes"),
        ({"volumes": ["/var/run/docker.sock:/s"]}, None, "would give away the engine"),
        ({"volumes": ["/var:/mnt"]}, None, "would give away the engine"),
        ({"volumes": ["/a/../etc:/mnt"]}, None, "is not SOURCE:TARGET"),
        ({"networks": ["host"]}, None, "host_network"),
        ({"memory": "lots"}, None, "memory"),
        ({"image_name": "--privileged"}, None, "cannot be the name of an image"),
        ({"privileged": True}, None, "no option 'privileged'"),
        ({"capabilities": ["SYS_ADMIN"]}, None, "operator's"),
        ({"devices": ["/dev/kmsg"]}, None, "operator's"),
    ],
)
def test_why_a_kernel_does_not_start(boxed: Boxed, config: dict[str, Any], reason: str | None, said: str) -> None:
    with boxed(start=False, **config) as used:
        with pytest.raises(GPError) as caught:
            used.do(used.manager.start_kernel())
        text = str(caught.value)
        assert said.lower() in text.lower()
        assert reason is None or f"[{reason}]" in text, text


def test_why_an_images_kernel_does_not_start(boxed: Boxed, engine: Engine) -> None:
    image = engine.image("ends", 'ENTRYPOINT ["/bin/sh", "-c", "echo wrong turn; exit 3"]')
    with boxed(start=False, image_name=image) as used:
        with pytest.raises(LaunchFailed, match="wrong turn") as caught:
            used.do(used.manager.start_kernel())
        assert "[ContainerEnded]" in str(caught.value)
    with boxed(start=False, argv=["no-such-kernel", "{connection_file}"]) as used:
        with pytest.raises(LaunchFailed, match="no-such-kernel") as caught:
            used.do(used.manager.start_kernel())
        assert "[CommandNotFound]" in str(caught.value)


def test_users_choose_what_is_open_and_nothing_else(
    boxed: Boxed, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = {"type": "object", "properties": {"memory": {"type": "string", "format": "quantity", "maximum": "1Gi"}}}
    with boxed(start=False, parameters=opened) as used:
        hostile = {"KERNEL_MEMORY": "512Mi", "KERNEL_IMAGE": "evil", "KERNEL_UID": "0", "KERNEL_VOLUMES": "/:/mnt"}
        used.start(env={**os.environ, **hostile})
        told = inspected(engine, used)
        assert told["HostConfig"]["Memory"] == 2**29
        assert told["Config"]["User"] == "1000:100"
        assert not told["HostConfig"]["Binds"]
    with boxed(start=False, parameters=opened) as used, pytest.raises(GPError, match="more than the maximum"):
        used.do(used.manager.start_kernel(env={**os.environ, "KERNEL_MEMORY": "64Gi"}))


def test_kernels_of_an_image_are_discovered(boxed: Boxed, capsys: pytest.CaptureFixture[str]) -> None:
    with boxed(start=False):
        pass
    assert main(["install", "docker", "--image", IMAGE, "--discover", "*"]) == 0
    names = [name for name in KernelSpecManager().find_kernel_specs() if name.startswith("127.0.0.1-5000")]
    assert names, capsys.readouterr()
    with driven(KernelManager(kernel_name=names[0])) as used:
        assert "42" in used.run("6 * 7")
    assert main(["install", "docker", "--refresh"]) == 0


def test_a_killed_servers_kernel_is_taken_over(boxed: Boxed, installation: Installation) -> None:
    with boxed(start=False) as used:
        taken_over(installation, used, KERNEL, "5f1c9a52-0000-4000-8000-000000000006")


def test_an_engine_that_restarts_ends_no_kernel(boxed: Boxed, engine: Engine) -> None:
    with boxed() as used:
        used.run("x = 41")
        engine.kill_daemon()
        assert "42" in used.run("x + 1")
        assert used.alive
        engine.start_daemon()
        assert "42" in used.run("x + 1")
        used.restart()


def test_many_at_once(boxed: Boxed) -> None:
    with boxed(start=False):
        pass

    async def all_of_them() -> None:
        managers = [AsyncKernelManager(kernel_name=KERNEL) for _ in range(20)]
        await asyncio.gather(*(manager.start_kernel() for manager in managers))
        assert all(await asyncio.gather(*(manager.is_alive() for manager in managers)))
        await asyncio.gather(*(manager.shutdown_kernel(now=True) for manager in managers))

    asyncio.run(all_of_them())


# -- programs


def test_programs_of_all_sorts(boxed: Boxed, installation: Installation) -> None:
    with boxed(start=False):
        pass
    cells = ["import os; x = 41", "print(x + 1, os.path.exists('/.gp'))"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])  # type: ignore[no-untyped-call]
    NotebookClient(notebook, kernel_name=KERNEL).execute()
    assert notebook.cells[1].outputs[0].text == "42 True\n"
    path, script = installation.home / "in.ipynb", installation.home / "script.py"
    nbformat.write(notebook, path)  # type: ignore[no-untyped-call]
    script.write_text(cells[0] + "\n" + cells[1])
    programs = Path(sys.executable).parent
    for argv in (
        [programs / "papermill", "-k", KERNEL, "--log-output", path, installation.home / "out.ipynb"],
        [programs / "jupyter", "run", "--kernel", KERNEL, script],
    ):
        ran = subprocess.run(argv, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stderr
        assert "42 True" in ran.stdout + ran.stderr


def test_an_engine_without_a_swarm(
    boxed: Boxed, engine: Engine, installation: Installation, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who has only an engine hears of Swarms where one is asked for, and nowhere else."""
    with boxed(start=False):
        pass
    assert main(["doctor", "docker-swarm"]) == 0
    assert "in no Swarm" in capsys.readouterr().out
    assert main(["ps"]) == 0
    assert "swarm" not in "".join(capsys.readouterr())
    folder = installation.jupyter.data_dir / "kernels" / KERNEL / "kernel.json"
    folder.write_text(folder.read_text().replace("docker-provisioner", "docker-swarm-provisioner"))
    with driven(KernelManager(kernel_name=KERNEL), start=False) as used:
        with pytest.raises(LaunchFailed, match="not a swarm manager") as caught:
            used.do(used.manager.start_kernel())
        assert "[NotAManager]" in str(caught.value)
