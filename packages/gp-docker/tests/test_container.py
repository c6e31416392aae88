"""What a container is made of: users, mounts, networks, sizes, and what is refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gp_core import ConfigError, LaunchDenied, LaunchRequest
from gp_docker import container
from gp_docker.backend import DockerBackend
from gp_docker.images import Accounts, Image

USERS = Accounts.read(
    "root:x:0:0:root:/root:/bin/sh\nada:x:1000:100:Ada:/home/ada:/bin/sh\nbroken\nodd:x:y:z::/:\n", "data:x:2000:ada\n"
)


def backend(**options: Any) -> DockerBackend:
    return DockerBackend(image_name="python:3.12", **options)


def image(user: str = "", **environment: str) -> Image:
    return Image("python:3.12", "sha256:1", "python@sha256:2", user, environment, ())


def request(**more: Any) -> LaunchRequest:
    given = {"kernel_id": "k1", "kernel_name": "python", "user": "ada", "backend": "docker"}
    return LaunchRequest(**{**given, "argv": ["python", "-m", "x", "{connection_file}"], **more})


# -- users


@pytest.mark.parametrize(
    ("of_image", "options", "expected"),
    [
        ("", {}, (1000, 100)),
        ("ada", {}, (1000, 100)),
        ("4711", {}, (4711, 100)),
        ("4711:4712", {}, (4711, 4712)),
        ("0", {"user": "ada:data"}, (1000, 2000)),
        ("", {"uid": "0x3e9"}, (1001, 100)),
        ("", {"gid": "data"}, (1000, 2000)),
    ],
)
def test_who_a_kernel_runs_as(of_image: str, options: dict[str, str], expected: tuple[int, int]) -> None:
    user = container.user_of(backend(**options), image(of_image), USERS, request())
    assert (user.uid, user.gid) == expected


@pytest.mark.parametrize(
    "options", [{"user": name} for name in ("root", "0", "00", "+0", "0x0", "0b0", "ada:0", "ada:root")]
)
def test_no_spelling_of_root_is_let_in(options: dict[str, str]) -> None:
    with pytest.raises(LaunchDenied, match="prohibited_"):
        container.user_of(backend(**options), image("ada"), USERS, request())


def test_root_is_let_in_where_the_operator_says_so() -> None:
    user = container.user_of(backend(), image(), USERS, request(prohibited_uids=(), prohibited_gids=()))
    assert (user.uid, user.gid, user.home, user.note) == (0, 0, "/root", "")


def test_a_change_of_user_is_told() -> None:
    assert "1000:100" in container.user_of(backend(), image(), USERS, request()).note


def test_an_unknown_user_is_an_error() -> None:
    with pytest.raises(ConfigError, match="bob"):
        container.user_of(backend(user="bob"), image(), USERS, request())


def test_home_is_ours_for_a_user_that_the_image_does_not_know() -> None:
    unknown, known = container.User(4711, 100), container.User(1000, 100, "/home/ada")
    assert container.environment_of(backend(), image(), unknown)["HOME"] == container.HOME
    assert "HOME" not in container.environment_of(backend(), image(), known)
    assert "HOME" not in container.environment_of(backend(), image(HOME="/srv"), unknown)


# -- mounts and networks


@pytest.mark.parametrize(
    ("volumes", "allowed"),
    [
        (["data:/data"], []),
        (["/srv/data:/data:ro"], ["/srv"]),
        (["/srv//data/:/data"], ["/srv/data"]),
        (["/var/run/docker.sock:/s"], ["/var/run/docker.sock"]),
    ],
)
def test_what_may_be_mounted(volumes: list[str], allowed: list[str]) -> None:
    assert container.mounts_of(backend(volumes=volumes, allowed_volumes=allowed), request())


@pytest.mark.parametrize(
    ("volume", "allowed"),
    [
        ("/etc:/mnt", []),
        ("/srv2:/mnt", ["/srv"]),
        ("/:/mnt", ["/srv"]),
        ("/var:/mnt", ["/srv"]),
        ("/run:/mnt", ["/var"]),
        ("/var/run/docker.sock:/s", ["/var"]),
        ("/var/run:/s", ["/var"]),
        ("other:/data", ["data"]),
    ],
)
def test_what_may_not_be_mounted(volume: str, allowed: list[str]) -> None:
    with pytest.raises(LaunchDenied, match="allowed_volumes"):
        container.mounts_of(backend(volumes=[volume], allowed_volumes=allowed), request())


@pytest.mark.parametrize(
    "volume",
    [
        "", "data", "data:relative", "../x:/mnt", "/srv/../etc:/mnt", "/srv:/", "x://", "/srv:/.gp", "x://.gp",
        "/srv:/.gp/kernel", "data:/a/../.gp/kernel/home", "/srv:/m:rw,z", "a\nb:/mnt",
    ],
)  # fmt: skip
def test_what_is_no_mount(volume: str) -> None:
    with pytest.raises(ConfigError, match="volumes"):
        container.mounts_of(backend(volumes=[volume], allowed_volumes=["/srv"]), request())


@given(st.text(alphabet="/.abc:", max_size=24))
def test_no_path_outside_of_what_is_allowed_is_ever_mounted(text: str) -> None:
    try:
        (mount,) = container.mounts_of(backend(volumes=[text], allowed_volumes=["/a/b"]), request())
    except (ConfigError, LaunchDenied):
        return
    assert not mount.is_path or mount.source == "/a/b" or mount.source.startswith("/a/b/")


def test_a_mirrored_folder_must_be_allowed() -> None:
    options = {"mirror_working_dirs": True, "allowed_volumes": ["/home/ada"]}
    (mount,) = container.mounts_of(backend(**options), request(cwd="/home/ada/work"))
    assert mount == container.Mount("/home/ada/work", "/home/ada/work", False)
    with pytest.raises(LaunchDenied):
        container.mounts_of(backend(**options), request(cwd="/etc"))


def test_networks_of_the_machine_are_the_operators() -> None:
    for name in ("host", "container:db"):
        with pytest.raises(LaunchDenied, match="host_network"):
            container.check_networks(backend(networks=[name]), "k1")
        container.check_networks(backend(networks=[name], host_network=True), "k1")
    with pytest.raises(ConfigError):
        container.check_networks(backend(networks=["--x"]), "k1")


def test_images_must_match_what_is_allowed() -> None:
    allowed = backend(allowed_images=[r"registry\.example\.org/team/.*"])
    container.check_image(allowed, "registry.example.org/team/gpu:1", "k1")
    for name in (
        "python:3.12",
        "registry.example.org/teams:1",
        "x/registry.example.org/team/gpu:1",
        "sha256:" + "0" * 64,
    ):
        with pytest.raises(LaunchDenied, match="allowed_images"):
            container.check_image(allowed, name, "k1")


# -- the rest


def test_limits() -> None:
    config = container.host_config(
        backend(
            memory="1Gi", cpus="500m", shm_size="64M", ulimits={"nofile": "1:2"}, tmpfs=["/scratch:size=1g"], gpus="2"
        ),
        request(),
    )
    assert config["mem_limit"] == config["memswap_limit"] == 2**30
    assert config["nano_cpus"] == 5 * 10**8
    assert config["shm_size"] == 64 * 10**6
    assert config["ulimits"] == [{"Name": "nofile", "Soft": 1, "Hard": 2}]
    assert config["tmpfs"] == {"/scratch": "size=1g"}
    assert config["device_requests"] == [{"capabilities": [["gpu"]], "count": 2}]


def test_little_is_allowed_by_default() -> None:
    config = container.host_config(backend(), request())
    assert config["cap_drop"] == ["ALL"]
    assert config["security_opt"] == ["no-new-privileges"]
    assert config["pids_limit"] == 4096
    assert config["log_config"]["Config"] == {"max-size": "10m", "max-file": "2"}
    assert not {"privileged", "binds", "devices", "cap_add", "network_mode"} & set(config)


@pytest.mark.parametrize(
    "options",
    [
        {"memory": "-1"}, {"memory": "0"}, {"cpus": "many"}, {"cpus": "0"}, {"cpus": "0.1n"},
        {"shm_size": "$(id)"}, {"gpus": "all;rm"},
        {"tmpfs": ["/"]}, {"tmpfs": ["/.gp/kernel"]}, {"tmpfs": ["x"]}, {"tmpfs": ["/x:a b"]},
        {"ulimits": {"nofile": "x"}},
        {"ulimits": {"A=b": 1}},
    ],
)  # fmt: skip
def test_values_that_cannot_work(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        container.host_config(backend(**options), request())


@pytest.mark.parametrize("environment", [{"a b": "1"}, {"": "1"}, {"A": "\0"}])
def test_variables_that_cannot_be(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="environment"):
        container.environment_of(backend(environment=environment), image(), container.User(1, 1))


def test_secrets_are_for_the_kernels_user_alone(tmp_path: Path) -> None:
    launcher = tmp_path / "launcher"
    launcher.write_bytes(b"zip")
    wanted = request(secrets={"GP_LAUNCH_SECRETS": "token"}, launcher_file=launcher)
    for below, top in (("", ".gp/"), (container.BASE, "")):
        with tarfile.open(
            fileobj=io.BytesIO(container.files(wanted, container.User(4711, 4712), below=below))
        ) as archive:
            secrets = archive.getmember(f"{top}kernel/secrets")
            assert (secrets.mode, secrets.uid, secrets.gid) == (0o400, 4711, 4712)
            assert archive.getmember(f"{top}kernel").mode == 0o700
            assert (".gp" in archive.getnames()) == (not below)


def test_the_command() -> None:
    wanted = request(launcher_options=["--kernel-id=k1", "--response-address=h:1"])
    command = container.command_of(backend(), wanted, ours=["--x=1"], launcher="/l", dial_first="g:1")
    assert command == [
        *("python3", "-I", "-S", "/l", "--kernel-id=k1", "--response-address=g:1,h:1", "--x=1", "--"),
        *("python", "-m", "x", "{connection_file}"),
    ]
    assert container.started_by(command, backend()) == {"command": command}
    assert container.started_by(command, backend(entrypoint="replace")) == {"entrypoint": command}


def test_names_and_labels() -> None:
    name = container.name_of(request(user="Ada@example.org/x", kernel_id="5f1c9a52-0000-4000-8000-000000000001"))
    assert name == "Ada-example.org-x-5f1c9a52-0000-4000-8000-000000000001"
    labels = container.labels_of(backend(labels={"team": "x", "kernel_id": "mine"}), request(), "here")
    assert (labels["team"], labels["kernel_id"], labels["gp.installation"]) == ("x", "k1", "here")
