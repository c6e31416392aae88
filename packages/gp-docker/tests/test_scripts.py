"""What a submit script is told, and what of a user's it is not."""

from __future__ import annotations

from typing import Any

import pytest

from gp_core import LaunchDenied, LaunchRequest
from gp_docker.backend import DockerBackend
from gp_docker.scripts import for_script
from gp_docker.swarm import SwarmBackend

URL = "unix:///var/run/docker.sock"
SENT = {"KERNEL_UID": "0", "KERNEL_GID": "0", "KERNEL_IMAGE": "evil", "DOCKER_MODE": "swarm", "KERNEL_WORKING_DIR": "/"}


def request(**more: Any) -> LaunchRequest:
    given = {"kernel_id": "k1", "kernel_name": "python", "user": "ada", "backend": "docker", "argv": ["python", "x.py"]}
    return LaunchRequest(**{**given, **more})


def told(backend: Any, **more: Any) -> dict[str, str]:
    return for_script(backend, request(**more), url=URL).script_environment()


@pytest.mark.parametrize("where", ["env", "secrets"])
def test_options_count_and_not_what_users_send(where: str) -> None:
    env = told(DockerBackend(image_name="python:3.12", networks=["lab"]), **{where: {**SENT, "KERNEL_ID": "k1"}})
    assert env == {
        "KERNEL_ID": "k1",
        "KERNEL_IMAGE": "python:3.12",
        "KERNEL_UID": "1000",
        "KERNEL_GID": "100",
        "GP_DOCKER_MODE": "docker",
        "GP_DOCKER_NETWORK": "lab",
        "GP_REMOVE_CONTAINER": "False",
        "DOCKER_HOST": URL,
    }


def test_a_swarm_and_a_mirrored_folder() -> None:
    env = told(SwarmBackend(image_name="i:1", uid="1234", mirror_working_dirs=True), env=SENT)
    assert (env["GP_DOCKER_MODE"], env["KERNEL_UID"], env["KERNEL_WORKING_DIR"]) == ("swarm", "1234", "/")


@pytest.mark.parametrize(
    "options",
    [{"uid": "00"}, {"gid": "0x0"}, {"networks": ["host"]}, {"image": "evil", "allowed_images": ["python:.*"]}],
)
def test_what_is_denied_is_denied(options: dict[str, Any]) -> None:
    with pytest.raises(LaunchDenied):
        told(DockerBackend(image_name="python:3.12", **options))
