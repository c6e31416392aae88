"""gp-docker with real registries: images that have to be pulled first, by who may."""

from __future__ import annotations

import base64
import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clusters.availability import offer
from clusters.docker import LOGIN, Engine, Registry
from docker.errors import ImageNotFound
from support.boxed import Boxed, inspected

from gp_core.errors import LaunchFailed

pytestmark = [pytest.mark.timeout(300), pytest.mark.relay]


@pytest.fixture(scope="module")
def registries(engine: Engine) -> Iterator[tuple[Registry, Registry]]:
    """One for everybody, and one for who logs in."""
    made = Registry(engine, 5001), Registry(engine, 5002, closed=True)
    try:
        for registry in made:
            offer("docker", registry.up)
        yield made
    finally:
        for registry in made:
            registry.down()


@pytest.fixture
def image(engine: Engine, registries: tuple[Registry, Registry]) -> Iterator[Callable[..., str]]:
    """Put an image into one of the registries that the engine does not have, and return its name."""
    made = []

    def put(*, closed: bool = False) -> str:
        local = engine.image("pulled", "RUN dd if=/dev/urandom of=/work/ballast bs=1M count=30 status=none")
        made.append(registries[closed].filled(local, "team/kernel:1"))
        with engine.client() as client:
            client.remove_image(local, force=True)
        return made[-1]

    yield put
    with engine.client() as client:
        for name in made:
            with contextlib.suppress(ImageNotFound):
                client.remove_image(name, force=True)


def test_a_pull_is_told_with_layers_and_percent(
    boxed: Boxed,
    image: Callable[..., str],
    engine: Engine,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setattr("gp_docker.images.TOLD", 0.0)
    name = image()
    with boxed(image_name=name) as used:
        assert "42" in used.run("6 * 7")
        assert f"{name.rpartition(':')[0]}@sha256:" in used.run(
            "import os; print(os.environ['GP_KERNEL_IMAGE_DIGEST'])"
        )
        assert inspected(engine, used)["Image"].startswith("sha256:")
    assert re.search(rf"pulling {name}: [0-9] of [0-9] layers, [0-9]+ %", caplog.text)
    with boxed(image_name=name, pull_policy="always") as used:
        assert "42" in used.run("6 * 7")


def test_an_image_that_a_registry_does_not_have(boxed: Boxed, image: Callable[..., str]) -> None:
    name = image()
    for wrong in (name.replace(":1", ":2"), name.replace("team", "nobody")):
        with boxed(start=False, image_name=wrong) as used:
            with pytest.raises(LaunchFailed, match=wrong) as caught:
                used.do(used.manager.start_kernel())
            assert "[ImageNotFound]" in str(caught.value)


def test_a_registry_that_hangs(boxed: Boxed, image: Callable[..., str], registries: tuple[Registry, Registry]) -> None:
    name = image()
    with boxed(start=False, image_name=name, pull_timeout=2) as used:
        with registries[0].hanging(), pytest.raises(LaunchFailed, match="within 2 s") as caught:
            used.do(used.manager.start_kernel())
        assert "[PullTimeout]" in str(caught.value)
        used.start()  # again, and now it answers
        assert "42" in used.run("6 * 7")


def test_who_may_pull(
    boxed: Boxed,
    image: Callable[..., str],
    registries: tuple[Registry, Registry],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """People log in while the server runs, in a file or through a credential helper."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    name = image(closed=True)
    with boxed(start=False, image_name=name, pull_policy="always") as used:
        with pytest.raises(LaunchFailed, match="docker login") as caught:
            used.do(used.manager.start_kernel())
        assert "[PullDenied]" in str(caught.value)
        login = {"auth": base64.b64encode(":".join(LOGIN).encode()).decode()}
        (tmp_path / "config.json").write_text(json.dumps({"auths": {registries[1].name: login}}))
        used.start()
    said = json.dumps({"ServerURL": registries[1].name, "Username": LOGIN[0], "Secret": LOGIN[1]})
    helper = tmp_path / "docker-credential-gp"
    helper.write_text(f"#!/bin/sh\necho '{said}'\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    wrong = {registries[1].name: {"auth": base64.b64encode(b"reader:wrong").decode()}}
    (tmp_path / "config.json").write_text(json.dumps({"auths": wrong}))
    with boxed(start=False, image_name=name, pull_policy="always") as used:
        with pytest.raises(LaunchFailed, match="PullDenied"):
            used.do(used.manager.start_kernel())
        (tmp_path / "config.json").write_text(json.dumps({"credHelpers": {registries[1].name: "gp"}}))
        used.start()
        assert "42" in used.run("6 * 7")
