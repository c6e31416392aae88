"""Names of images, their users, how a pull is told, and what an engine's words mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gp_core import ConfigError, State
from gp_core.errors import COMMAND_NOT_FOUND, OUT_OF_MEMORY
from gp_docker import reasons, states
from gp_docker.images import Accounts, Image, Layers, checked_reference


@pytest.mark.parametrize(
    "name",
    ["python", "python:3.12", "127.0.0.1:5000/x/y:1", "ghcr.io/a/b_c@sha256:" + "a" * 64, "sha256:" + "0" * 64],
)
def test_names_of_images(name: str) -> None:
    assert checked_reference(name) == name


@pytest.mark.parametrize("name", ["", "-x", "--privileged", "a b", "a\n", "a;b", "$(id)", "../x", "x" * 600, "a:b:c"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ConfigError):
        checked_reference(name)


@given(st.text(), st.text())
def test_any_passwd_can_be_read(passwd: str, group: str) -> None:
    read = Accounts.read(passwd, group)
    assert all(isinstance(uid, int) for _, uid, _, _ in read.users)


def test_the_first_of_equal_names_counts() -> None:
    read = Accounts.read("a:x:5:6:::\na:x:7:8:::\n", "")
    assert read.resolve("a") == (5, 6)


def test_an_image_is_named_by_its_registrys_digest() -> None:
    told = {"Id": "sha256:1", "RepoDigests": ["other@sha256:2", "ghcr.io/a/b@sha256:3"], "Config": {"Env": ["A=b=c"]}}
    image = Image.of("ghcr.io/a/b:1", told)
    assert image.digest == "ghcr.io/a/b@sha256:3"
    assert image.environment == {"A": "b=c"}
    assert Image.of("x", {"Id": "sha256:1", "Config": None}).digest == "sha256:1"


def test_how_far_a_pull_is() -> None:
    layers = Layers()
    assert str(layers) == ""
    for one in ("a", "b"):
        layers.hear({"status": "Pulling fs layer", "id": one})
    layers.hear({"status": "Downloading", "id": "a", "progressDetail": {"current": 30, "total": 100}})
    assert str(layers) == ": 0 of 2 layers, 30 %"
    layers.hear({"status": "Download complete", "id": "a"})
    layers.hear({"status": "Pull complete", "id": "a"})
    assert str(layers) == ": 1 of 2 layers, 100 %"
    layers.hear({"status": "Digest: sha256:1"})


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ('exec: "python4": executable file not found in $PATH: unknown', COMMAND_NOT_FOUND),
        ("exec /bin/sh: exec format error", reasons.EXEC_FORMAT),
        ('could not select device driver "" with capabilities: [[gpu]]', reasons.NO_SUCH_DEVICE),
        ("Bind for 0.0.0.0:80 failed: port is already allocated", reasons.PORT_CONFLICT),
        ("pull access denied for x, repository does not exist", reasons.PULL_DENIED),
        ("Get https://r/v2/: dial tcp 127.0.0.1:5000: connect: connection refused", reasons.REGISTRY_UNREACHABLE),
        ("manifest unknown: manifest unknown", reasons.IMAGE_NOT_FOUND),
        ('Credentials store docker-credential-pass exited with "not initialized".', reasons.PULL_DENIED),
        ("network nowhere not found", reasons.NO_SUCH_NETWORK),
        ("unable to find user bob: no matching entries in passwd file", reasons.NO_SUCH_USER),
        ("something new", reasons.BAD_OPTION),
    ],
)
def test_what_an_engine_says(said: str, reason: object) -> None:
    assert reasons.reason_of(said, reasons.BAD_OPTION, pulling=True) is reason


@pytest.mark.parametrize(
    "said",
    [
        "error while creating mount source path '/nfs/ada': mkdir /nfs/ada: permission denied",
        "failed to initialize logging driver: dial tcp 10.0.0.1:514: connect: connection refused",
    ],
)
def test_what_was_denied_is_no_registry_unless_an_image_is_pulled(said: str) -> None:
    assert reasons.reason_of(said, reasons.BAD_OPTION) is reasons.BAD_OPTION


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"Status": "created"}, (State.PENDING, None, None)),
        ({"Status": "running"}, (State.RUNNING, None, None)),
        ({"Status": "paused"}, (State.RUNNING, None, None)),
        ({"Status": "exited", "ExitCode": 0}, (State.GONE, 0, reasons.CONTAINER_ENDED)),
        ({"Status": "exited", "ExitCode": 127}, (State.GONE, 127, COMMAND_NOT_FOUND)),
        ({"Status": "exited", "ExitCode": 137, "OOMKilled": True}, (State.GONE, -9, OUT_OF_MEMORY)),
        ({"Status": "dead", "ExitCode": 143}, (State.GONE, -15, reasons.CONTAINER_ENDED)),
        ({"Status": "new to us"}, (State.UNKNOWN, None, None)),
    ],
)
def test_what_a_state_means(state: dict[str, object], expected: tuple[object, ...]) -> None:
    status = states.status_of({"State": state})
    assert (status.state, status.exit_code, status.reason) == expected


def test_where_a_container_is() -> None:
    assert (
        states.address_of({"NetworkSettings": {"Networks": {"a": {"IPAddress": ""}, "b": {"IPAddress": "1.2.3.4"}}}})
        == "1.2.3.4"
    )
    assert states.address_of({"NetworkSettings": {"Networks": {"host": {}}}}) == "127.0.0.1"
    assert states.address_of({}) is None
