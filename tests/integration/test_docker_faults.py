"""gp-docker while somebody ends containers, engines die or hang, and images do nothing of what they should."""

from __future__ import annotations

import contextlib
import getpass
import threading
from pathlib import Path

import pytest
from clusters.docker import IMAGE, Engine, offered
from jupyter_client.manager import KernelManager
from support.answering import HostApplication
from support.boxed import KERNEL, Boxed, boxing, inspected
from support.installation import Installation, wait_until

from gp_core.cli import main
from gp_core.errors import GPError, LaunchFailed

pytestmark = [pytest.mark.timeout(300), pytest.mark.relay]


@pytest.mark.parametrize("act", ["remove", "kill", "stop", "pause and remove"])
def test_a_container_that_somebody_ends(boxed: Boxed, engine: Engine, act: str) -> None:
    with boxed() as used, engine.client() as client:
        found = inspected(engine, used)["Id"]
        if act.startswith("pause"):
            client.pause(found)
            assert used.alive
            act = "remove"
        {"remove": lambda: client.remove_container(found, force=True), "kill": lambda: client.kill(found)}.get(
            act, lambda: client.stop(found)
        )()
        wait_until(lambda: not used.alive, 20)
        used.do(used.manager.restart_kernel(now=True))
        used.ready()
        assert "42" in used.run("6 * 7")


@pytest.mark.parametrize("code", [0, 1, 126, 127, 137])
def test_an_image_that_ends_at_once(boxed: Boxed, engine: Engine, code: int) -> None:
    image = engine.image("ends", f'ENTRYPOINT ["/bin/sh", "-c", "echo last words; exit {code}"]')
    reason = "CommandNotFound" if code in (126, 127) else "ContainerEnded"
    with boxed(start=False, image_name=image) as used:
        with pytest.raises(LaunchFailed, match="last words") as caught:
            used.do(used.manager.start_kernel())
        assert f"[{reason}]" in str(caught.value)


def test_an_image_that_never_starts_anything(boxed: Boxed, engine: Engine) -> None:
    image = engine.image("sleeps", 'ENTRYPOINT ["/bin/sh", "-c", "echo dozing; exec sleep 600"]')
    with boxed(start=False, image_name=image, launch_timeout=3, stop_timeout=1) as used:
        with pytest.raises(LaunchFailed, match="dozing") as caught:
            used.do(used.manager.start_kernel())
        assert "[CallbackUnreachable]" in str(caught.value)


def test_an_image_that_prints_without_end(boxed: Boxed, engine: Engine) -> None:
    line = "b'x' * 99_999 + bytes([10])"
    code = f"import os, sys; [os.write(1, {line}) for _ in range(10_000)]; print('noise'); sys.exit(3)"
    image = engine.image("prints", f'ENTRYPOINT ["python3", "-c", "{code}"]')
    with boxed(start=False, image_name=image, launch_timeout=60) as used:
        with pytest.raises(LaunchFailed, match="noise") as caught:
            used.do(used.manager.start_kernel())
        assert len(str(caught.value)) < 20_000


def test_an_engine_that_hangs_fails_a_start_and_ends_no_kernel(
    boxed: Boxed, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gp_docker.engine.PATIENCE", 1.0)
    with boxed() as used:
        with engine.hanging():
            assert "42" in used.run("6 * 7")
            other = KernelManager(kernel_name=KERNEL)
            with pytest.raises(GPError, match="does not answer"):
                used.do(other.start_kernel())
            assert used.alive
        assert used.alive
        used.restart()


@pytest.mark.parametrize("after", [0.05, 0.3, 0.8])
def test_an_engine_that_is_killed_during_a_start(boxed: Boxed, engine: Engine, after: float) -> None:
    with boxed(start=False) as used:
        killer = threading.Timer(after, engine.kill_daemon)
        killer.start()
        try:
            with contextlib.suppress(GPError):
                used.do(used.manager.start_kernel())
        finally:
            killer.join()
            engine.start_daemon()


def test_what_a_killed_server_leaves_is_removed_by_the_next(
    boxed: Boxed, engine: Engine, installation: Installation
) -> None:
    with boxed(orphan_timeout=1) as used:
        one = HostApplication(installation, "MappingKernelManager")
        one.ask(f"start 5f1c9a52-0000-4000-8000-000000000007 {KERNEL}")
        assert engine.counts()["containers"] == 2
        one.end()

        def ended() -> bool:
            with engine.client() as client:
                return len(client.containers(all=True, filters={"status": "exited"})) == 1

        wait_until(ended, 30)
        used.shutdown()
    assert main(["gc"]) == 0


def test_doctor_dials_back_from_a_container(
    boxed: Boxed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with boxed(start=False):
        pass
    monkeypatch.setenv("GP_IMAGE_NAME", IMAGE)
    main(["doctor", "docker-provisioner"])
    assert "reached" in capsys.readouterr().out
    monkeypatch.setenv("GP_RESPONSE_IP", "192.0.2.1")
    assert main(["doctor", "docker-provisioner"]) != 0
    assert "192.0.2.1" in capsys.readouterr().out


def test_two_installations_on_one_engine(
    boxed: Boxed, engine: Engine, installation: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither touches what is the other's, alive or dead."""
    with boxed() as used:
        stopped = engine_container(engine, "gp.installation=of-somebody-else", "kernel_id=5f1c9a52")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GP_DATA_DIR", str(tmp_path / "other"))
            other = HostApplication(installation, "MappingKernelManager")
            other.ask(f"start 5f1c9a52-0000-4000-8000-000000000008 {KERNEL}")
            assert main(["gc", "--all"]) == 0
            other.ask("shutdown 5f1c9a52-0000-4000-8000-000000000008")
            other.end()
        assert "42" in used.run("6 * 7")
        assert main(["gc"]) == 0
        with engine.client() as client:
            client.remove_container(stopped)  # raises if somebody else has


def engine_container(engine: Engine, *labels: str) -> str:
    """Make a container that has ended."""
    with engine.client() as client:
        made = str(client.create_container(IMAGE, ["true"], labels=dict(one.split("=") for one in labels))["Id"])
        client.start(made)
        client.wait(made)
    return made


def test_a_container_of_others_is_not_replaced(boxed: Boxed, engine: Engine) -> None:
    """Names are made of kernel ids, which clients may choose."""
    with boxed(start=False) as used, engine.client() as client:
        made = client.create_container(IMAGE, ["true"], name=f"{getpass.getuser()}-database")["Id"]
        try:
            client.start(made)
            client.wait(made)
            with pytest.raises(LaunchFailed, match="NameTaken"):
                used.do(used.manager.start_kernel(kernel_id="database"))
            assert client.inspect_container(made)["Id"] == made
        finally:
            client.remove_container(made)


def test_one_kernel_id_twice(boxed: Boxed, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with boxed() as used:
        kernel_id = used.manager.kernel_id
        with pytest.raises(GPError, match=kernel_id):
            KernelManager(kernel_name=KERNEL).start_kernel(kernel_id=kernel_id)
        with engine.client() as client:
            assert len(client.containers(all=True, filters={"label": f"kernel_id={kernel_id}"})) == 1
        assert "42" in used.run("6 * 7")


def test_a_full_disk(installation: Installation, ipykernel_spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with offered("d3", disk="500m") as small:
        monkeypatch.setenv("DOCKER_HOST", small.url)
        with boxing(installation, ipykernel_spec, small) as boxed:
            small.inside("sh", "-c", f"dd if=/dev/zero of={small.folder}/data/ballast bs=64k 2>/dev/null; true")
            with boxed(start=False) as used, pytest.raises(LaunchFailed, match="no space left") as caught:
                used.do(used.manager.start_kernel())
            assert "[DiskFull]" in str(caught.value)
            small.inside("rm", f"{small.folder}/data/ballast")
            with boxed() as used:
                assert "42" in used.run("6 * 7")
