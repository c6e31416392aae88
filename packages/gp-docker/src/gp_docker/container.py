"""What a kernel's container is made of: checked options, a command, and the files that are put into it."""

from __future__ import annotations

import io
import posixpath
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gp_core import ConfigError, LaunchDenied, LaunchRequest
from gp_core.parameters import control_character, quantity

from .images import Accounts, Image
from .options import ContainerOptions, DockerOptions

BASE = "/.gp"
"""Folder of ours in a container; a volume if nothing else can be written."""

OWN = f"{BASE}/kernel"
"""Folder of the launcher's, which only the kernel's user can enter."""

LAUNCHER, SECRETS, HOME = f"{OWN}/gp-launcher.pyz", f"{OWN}/secrets", f"{OWN}/home"
FALLBACK = (1000, 100)
"""User and group where those of an image are prohibited; the peer's default, too."""

SOCKETS = ("/var/run/docker.sock", "/run/docker.sock", "/run/containerd", "/run/podman", "/var/lib/docker")
"""Who has one of these has the machine."""

VOLUME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class User:
    """Whom a kernel runs as.

    Args:
        uid: Number.
        gid: Number.
        home: Its folder; empty: it has none.
        note: What people should know of the choice.
    """

    uid: int
    gid: int
    home: str = ""
    note: str = ""

    def __str__(self) -> str:
        return f"{self.uid}:{self.gid}"


def user_of(options: ContainerOptions, image: Image, accounts: Accounts, request: LaunchRequest) -> User:
    """Choose whom a kernel runs as, as numbers.

    Args:
        options: Of the backend.
        image: The image.
        accounts: The image's.
        request: Has what is prohibited.

    Raises:
        ConfigError: There is no such user.
        LaunchDenied: It is prohibited.
    """
    uid, gid = accounts.resolve(options.user or image.user)
    if options.uid:
        uid, gid = accounts.resolve(options.uid)
    if options.gid:
        gid = accounts.resolve(f"{uid}:{options.gid}")[1]
    of_image = f"{uid}:{gid}"
    if uid in request.prohibited_uids and not (options.user or options.uid):
        uid = FALLBACK[0]
    if gid in request.prohibited_gids and not (options.gid or ":" in options.user):
        gid = FALLBACK[1]
    for what, number, prohibited in (("uid", uid, request.prohibited_uids), ("gid", gid, request.prohibited_gids)):
        if number in prohibited:
            raise LaunchDenied(
                f"kernel {request.kernel_id} may not run with {what} {number} (prohibited_{what}s): choose another user"
            )
    changed = of_image != f"{uid}:{gid}"
    note = f"it runs as {uid}:{gid}: {of_image}, as image {image.name} wants it, is prohibited here" if changed else ""
    return User(uid, gid, accounts.home(uid), note)


def command_of(
    options: ContainerOptions, request: LaunchRequest, *, ours: Sequence[str], launcher: str, dial_first: str = ""
) -> list[str]:
    """Return the command inside: the launcher, then the kernel's.

    Args:
        options: Of the backend.
        request: Of the core.
        ours: More options of the launcher.
        launcher: Path of its file.
        dial_first: ``host:port`` that the launcher tries first.

    Raises:
        ConfigError: The kernelspec starts a launcher that cannot get the secrets.
    """
    if not request.wrapped:
        if not any("gp_launchers" in word or "gp-launcher" in word for word in request.argv):
            raise ConfigError(
                f"kernel {request.kernel_id}: its argv starts a launcher of another kind inside the image: "
                'leave the launcher out of argv, or put "submit": "script" into the config'
            )
        return [*request.argv, *ours]
    start = [options.python, "-I", "-S", launcher]
    return [*start, *request.launcher_arguments(dial_first=dial_first), *ours, "--", *request.argv]


def started_by(command: Sequence[str], options: ContainerOptions) -> dict[str, Any]:
    """Return command and entrypoint of a container."""
    if options.entrypoint == "replace":
        return {"entrypoint": list(command)}
    return {"command": list(command)}


def environment_of(options: ContainerOptions, image: Image, user: User) -> dict[str, str]:
    """Return the variables of the container; no secret."""
    given = {str(name): str(value) for name, value in options.environment.items()}
    for name, value in given.items():
        if not NAME.fullmatch(name) or "\0" in value:
            raise ConfigError(f"environment: {name!r} cannot be a variable of a container")
    at_home = {} if user.home or "HOME" in image.environment else {"HOME": HOME}
    return {**at_home, **given, "GP_KERNEL_IMAGE": image.name, "GP_KERNEL_IMAGE_DIGEST": image.digest}


def files(request: LaunchRequest, user: User, *, below: str = "") -> bytes:
    """Return what is put into a created container, as a tar: the launcher, and the secrets for nobody but its user.

    Args:
        request: Has both.
        user: The kernel's.
        below: Folder that exists already, where the tar is unpacked.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:

        def add(path: str, mode: int, data: bytes | None = None, *, mine: bool = True) -> None:
            info = tarfile.TarInfo(posixpath.relpath(path, below or "/"))
            info.mode = mode
            info.uid, info.gid = (user.uid, user.gid) if mine else (0, 0)
            if data is None:
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            else:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))

        if not below:
            add(BASE, 0o755, mine=False)
        add(OWN, 0o700)
        add(HOME, 0o700)
        add(LAUNCHER, 0o444, Path(request.launcher_file).read_bytes())
        add(SECRETS, 0o400, request.secrets.get("GP_LAUNCH_SECRETS", "").encode())
    return buffer.getvalue()


def name_of(request: LaunchRequest) -> str:
    """Return the name of a kernel's container or service: user and kernel id, as far as names go."""
    user = re.sub(r"[^A-Za-z0-9_.-]", "-", request.user).strip("-._")[:20] or "kernel"
    return f"{user}-{re.sub(r'[^A-Za-z0-9_.-]', '-', request.kernel_id)[:42]}"  # 63: names of services are host names


def labels_of(options: ContainerOptions, request: LaunchRequest, installation: str) -> dict[str, str]:
    """Return the labels by which a kernel is found again, and those that people want."""
    given = {str(name): str(value) for name, value in options.labels.items()}
    return {
        **given,
        "kernel_id": request.kernel_id,
        "gp.installation": installation,
        "gp.kernel_name": request.kernel_name,
        "gp.user": request.user,
    }


# -- checks


def size_of(name: str, text: str) -> int:
    """Return the bytes that an option stands for.

    Raises:
        ConfigError: It is no size.
    """
    try:
        size = int(quantity(text))
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None
    if size <= 0:
        raise ConfigError(f"{name}: {text!r} is nothing")
    return size


def nano_cpus(text: str, name: str, *, least: int = 1) -> int:
    """Return processors in billionths; 0 for no text.

    Args:
        text: Such as ``2`` or ``500m``, or nothing.
        name: Of the option.
        least: Billionths that a text must come to: the engine would take a limit of nothing for none.

    Raises:
        ConfigError: It is no number.
    """
    try:
        number = int(quantity(text or "0") * 10**9)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None
    if text and number < least:
        raise ConfigError(f"{name}: {text!r} is too little")
    return number


def check_image(options: ContainerOptions, name: str, kernel_id: str) -> None:
    """Check an image's name against the operator's patterns.

    Raises:
        LaunchDenied: None of them matches.
    """
    patterns = options.allowed_images
    if patterns and not any(re.fullmatch(pattern, name) for pattern in patterns):
        raise LaunchDenied(f"kernel {kernel_id}: image {name} is not allowed here (allowed_images)")


@dataclass(frozen=True)
class Mount:
    """A volume or path of the machine inside a container."""

    source: str
    target: str
    read_only: bool

    @property
    def is_path(self) -> bool:
        return self.source.startswith("/")


def mounts_of(options: ContainerOptions, request: LaunchRequest) -> list[Mount]:
    """Return what is mounted.

    Raises:
        ConfigError: A value is none.
        LaunchDenied: The operator does not allow it.
    """
    wanted = [_mount(text) for text in options.volumes]
    if options.mirror_working_dirs and request.cwd:
        wanted.append(_mount(f"{request.cwd}:{request.cwd}"))
    for mount in wanted:
        _check_mount(options, mount, request.kernel_id)
    return wanted


def _mount(text: str) -> Mount:
    source, _, rest = text.partition(":")
    target, _, mode = rest.partition(":")
    fine = (
        mode in ("", "ro", "rw")
        and _can_be_mounted_at(target)
        and (VOLUME.fullmatch(source) or (source.startswith("/") and ".." not in source.split("/")))
        and not control_character(text)
    )
    if not fine:
        raise ConfigError(f"volumes: {text[:200]!r} is not SOURCE:TARGET or SOURCE:TARGET:ro")
    return Mount(_normal(source) if source.startswith("/") else source, _normal(target), mode == "ro")


def _can_be_mounted_at(target: str) -> bool:
    """Whether a path can be the target of a mount: not all of the container, and not where the launcher is put."""
    return target.startswith("/") and _normal(target) != "/" and not _within(_normal(target), BASE)


def _normal(path: str) -> str:
    return posixpath.normpath(re.sub("/+", "/", path))


def _check_mount(options: ContainerOptions, mount: Mount, kernel_id: str) -> None:
    allowed = [_normal(one) if one.startswith("/") else one for one in options.allowed_volumes]
    if not mount.is_path:
        names = [one for one in allowed if not one.startswith("/")]
        if names and mount.source not in names:
            raise LaunchDenied(f"kernel {kernel_id}: volume {mount.source} is not allowed here (allowed_volumes)")
        return
    if any(_within(socket, mount.source) or _within(mount.source, socket) for socket in SOCKETS):
        if mount.source not in allowed:  # by its own name only
            raise LaunchDenied(f"kernel {kernel_id}: {mount.source} would give away the engine (allowed_volumes)")
    elif not any(_within(mount.source, one) for one in allowed if one.startswith("/")):
        raise LaunchDenied(f"kernel {kernel_id}: {mount.source} may not be mounted here (allowed_volumes)")


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def check_networks(options: ContainerOptions, kernel_id: str) -> None:
    """Check which networks a kernel is to be in.

    Raises:
        ConfigError: One cannot be a network.
        LaunchDenied: The operator does not allow it.
    """
    for name in options.networks:
        if (name == "host" or name.startswith("container:")) and not options.host_network:
            raise LaunchDenied(f"kernel {kernel_id}: network {name} is not allowed here (host_network)")
        if not VOLUME.fullmatch(name.removeprefix("container:")):
            raise ConfigError(f"networks: {name[:100]!r} cannot be a network")


def gpu_request(text: str) -> dict[str, Any]:
    """Return what is asked of the engine for option ``gpus``.

    Raises:
        ConfigError: It is neither "all", nor a number, nor ids.
    """
    if not re.fullmatch(r"all|[0-9]{1,3}|[\w.:-]+(,[\w.:-]+)*", text):
        raise ConfigError(f'gpus: {text[:100]!r} is neither "all", nor a number, nor ids separated by commas')
    wanted = (
        {"count": -1}
        if text == "all"
        else {"count": int(text)}
        if text.isdecimal()
        else {"device_ids": text.split(",")}
    )
    return {"capabilities": [["gpu"]], **wanted}


def ulimits_of(options: ContainerOptions) -> list[dict[str, Any]]:
    """Return option ``ulimits`` as the engine wants it.

    Raises:
        ConfigError: A value is no limit.
    """
    found = []
    for name, value in options.ulimits.items():
        soft, _, hard = str(value).partition(":")
        if not re.fullmatch("[a-z]+", str(name)) or not re.fullmatch(r"-?[0-9]+(:-?[0-9]+)?", str(value)):
            raise ConfigError(f"ulimits: {name!r}: {value!r} is not NUMBER or SOFT:HARD")
        found.append({"Name": name, "Soft": int(soft), "Hard": int(hard or soft)})
    return found


def tmpfs_of(options: ContainerOptions) -> dict[str, str]:
    """Return folders in memory and their options.

    Raises:
        ConfigError: One is no path.
    """
    folders = dict(text.partition(":")[::2] for text in options.tmpfs)
    for path, how in folders.items():
        if not _can_be_mounted_at(path) or not re.fullmatch(r"[\w=,.%-]*", how):
            raise ConfigError(f"tmpfs: {path[:100]!r} is not PATH or PATH:size=1g")
    return {"/tmp": "", **folders} if options.read_only else folders


def host_config(options: DockerOptions, request: LaunchRequest) -> dict[str, Any]:
    """Return what `docker.APIClient.create_host_config` gets: all that is not of the image.

    Raises:
        ConfigError: An option cannot work.
        LaunchDenied: The operator does not allow it.
    """
    check_networks(options, request.kernel_id)
    memory = size_of("memory", options.memory) if options.memory else None
    binds = [f"{one.source}:{one.target}{':ro' if one.read_only else ''}" for one in mounts_of(options, request)]
    config: dict[str, Any] = {
        "init": options.init or None,
        "cap_drop": ["ALL"],
        "cap_add": options.capabilities or None,
        "security_opt": options.security_opt or None,
        "pids_limit": options.pids_limit,
        "read_only": options.read_only or None,
        "tmpfs": tmpfs_of(options) or None,
        "ulimits": ulimits_of(options) or None,
        "binds": binds or None,
        "mem_limit": memory,
        "memswap_limit": memory,  # no swap besides
        "nano_cpus": nano_cpus(options.cpus, "cpus") or None,
        "shm_size": size_of("shm_size", options.shm_size) if options.shm_size else None,
        "devices": options.devices or None,
        "device_requests": [gpu_request(options.gpus)] if options.gpus else None,
        "network_mode": options.networks[0] if options.networks else None,
    }
    if options.log_driver:
        limits = {"max-size": "10m", "max-file": "2"} if options.log_driver in ("json-file", "local") else {}
        config["log_config"] = {"Type": options.log_driver, "Config": limits}
    return {name: value for name, value in config.items() if value is not None}
