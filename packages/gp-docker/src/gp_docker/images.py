"""Images of an engine: have one there, and know what it says about its kernels: user, entrypoint, digest."""

from __future__ import annotations

import asyncio
import io
import re
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gp_core import ConfigError, LaunchFailed
from gp_core.policies import normalise_id
from gp_core.runtime import runtime, within

from .engine import Engine
from .reasons import IMAGE_NOT_FOUND, PULL_TIMEOUT, Refused

if TYPE_CHECKING:
    from docker import APIClient

REFERENCE = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]*(:[0-9]+)?(/[A-Za-z0-9][A-Za-z0-9._-]*)*(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?"
)
ID = re.compile(r"sha256:[0-9a-f]{64}|[0-9a-f]{64}")
TOLD = 1.0  # seconds between two remarks about a pull
LARGEST = 1 << 20  # bytes of an image's passwd


@dataclass(frozen=True)
class Accounts:
    """Users and groups of an image.

    Args:
        users: Name, uid, gid and home of each.
        groups: Number by name.
    """

    users: tuple[tuple[str, int, int, str], ...] = ()
    groups: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, passwd: str, group: str) -> Accounts:
        """Read ``/etc/passwd`` and ``/etc/group``; lines that are none are left out."""
        users, groups = [], {}
        for line in passwd.splitlines():
            parts = line.split(":")
            if len(parts) >= 6 and parts[2].isdecimal() and parts[3].isdecimal():
                users.append((parts[0], int(parts[2]), int(parts[3]), parts[5]))
        for line in group.splitlines():
            parts = line.split(":")
            if len(parts) >= 3 and parts[2].isdecimal():
                groups[parts[0]] = int(parts[2])
        return cls(tuple(users), groups)

    def resolve(self, user: str) -> tuple[int, int]:
        """Return the numbers that a container of ``USER[:GROUP]`` runs with.

        Args:
            user: Names or numbers, in any way of writing them; empty: root.

        Raises:
            ConfigError: There is no such user or group.
        """
        name, colon, group = (user or "0").partition(":")
        by_name = {one[0]: one[1] for one in reversed(self.users)}
        uid = normalise_id(name, "uid", lookup=by_name.__getitem__)
        gid = next((one[2] for one in self.users if one[1] == uid), 0)
        if colon:
            gid = normalise_id(group, "gid", lookup=self.groups.__getitem__)
        return uid, gid

    def home(self, uid: int) -> str:
        """Return the home folder of a user; empty for one that the image does not know."""
        return next((one[3] for one in self.users if one[1] == uid), "")


@dataclass(frozen=True)
class Image:
    """An image that an engine has.

    Args:
        name: As it was asked for.
        id: Of its configuration; the same on every engine.
        digest: ``repository@sha256:...`` of a registry, or its id if it came from none.
        user: That it names.
        environment: Variables.
        entrypoint: Of its own.
    """

    name: str
    id: str
    digest: str
    user: str
    environment: Mapping[str, str]
    entrypoint: tuple[str, ...]

    @classmethod
    def of(cls, name: str, told: Mapping[str, Any]) -> Image:
        """Read what an engine tells of it."""
        config = told.get("Config") or {}
        pairs = (line.partition("=") for line in config.get("Env") or ())
        repository = name.partition("@")[0]
        digests = [one for one in told.get("RepoDigests") or () if one.partition("@")[0] in repository]
        entrypoint = config.get("Entrypoint") or ()
        return cls(
            name,
            told["Id"],
            (digests or told.get("RepoDigests") or [told["Id"]])[0],
            config.get("User") or "",
            {key: value for key, _, value in pairs},
            (entrypoint,) if isinstance(entrypoint, str) else tuple(entrypoint),
        )


def checked_reference(name: str) -> str:
    """Return an image's name.

    Raises:
        ConfigError: It cannot be one.
    """
    if not name:
        raise ConfigError("no image: set image_name in the config of the kernelspec, or GP_IMAGE_NAME")
    if len(name) > 512 or not (REFERENCE.fullmatch(name) or ID.fullmatch(name)):
        raise ConfigError(f"{name[:120]!r} cannot be the name of an image")
    return name


async def present(
    engine: Engine,
    name: str,
    *,
    policy: str,
    platform: str,
    timeout: float,
    kernel_id: str,
    progress: Callable[[str], object],
) -> Image:
    """Return an image that the engine has, pulled if need be.

    Args:
        engine: The engine.
        name: Of the image.
        policy: "missing", "always" or "never".
        platform: Such as ``linux/arm64``; empty: the engine's own.
        timeout: Seconds for a pull.
        kernel_id: For whom.
        progress: Hears of a pull.

    Raises:
        LaunchFailed: It is not there and cannot be pulled.
        EngineUnreachable: There is no answer.
    """
    if policy != "always":
        try:
            return await inspected(engine, name)
        except Refused as error:
            if error.status != 404:
                raise
            if policy == "never":
                text = f"kernel {kernel_id}: engine {engine} does not have image {name}, and pull_policy is never"
                raise LaunchFailed(text, reason=IMAGE_NOT_FOUND) from None
    key = ("pull", name, platform)
    listeners = engine.known.setdefault(("told", name, platform), set())
    listeners.add(progress)
    pull = engine.known.get(key) or asyncio.ensure_future(_pull(engine, name, platform, listeners))
    engine.known[key] = pull
    try:
        pull.add_done_callback(lambda done: _forget(engine, key, done))
        await within(timeout, asyncio.shield(pull))
        return await inspected(engine, name)
    except asyncio.TimeoutError:
        _forget(engine, key, pull)  # the next start must not wait for one that hangs
        text = f"kernel {kernel_id}: image {name} was not pulled within {timeout:g} s"
        raise LaunchFailed(text, reason=PULL_TIMEOUT) from None
    except Refused as error:
        raise error.as_failure(kernel_id, f"pull image {name}", IMAGE_NOT_FOUND, pulling=True) from None
    finally:
        listeners.discard(progress)


def _forget(engine: Engine, key: tuple[str, ...], pull: asyncio.Future[None]) -> None:
    if engine.known.get(key) is pull:
        del engine.known[key]


async def inspected(engine: Engine, name: str) -> Image:
    """Return an image that the engine has.

    Raises:
        Refused: It has none of that name.
    """
    return Image.of(name, await engine.do(lambda client: client.inspect_image(name)))


async def _pull(engine: Engine, name: str, platform: str, listeners: set[Callable[[str], object]]) -> None:
    def tell(text: str) -> None:
        for progress in list(listeners):
            progress(text)

    def pull(client: APIClient) -> None:
        layers, last = Layers(), 0.0
        client.reload_config()  # people log in while this runs
        # a name without tag or digest would pull all tags
        bare = name if re.search(r"(:[^/]+|@sha256:\w+)$", name) else f"{name}:latest"
        for told in client.pull(bare, stream=True, decode=True, platform=platform or None):
            if "error" in told:
                raise Refused(0, str(told["error"]))
            layers.hear(told)
            if (far := str(layers)) and time.monotonic() - last >= TOLD:
                last = time.monotonic()
                runtime().loop.call_soon_threadsafe(tell, f"pulling {name}{far}")

    tell(f"pulling {name}")
    client = await engine.connected()
    await runtime().apart(engine.asked, pull, client)


class Layers:
    """How far a pull is, from what an engine tells of each layer."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int]] = {}
        self._done: set[str] = set()

    def hear(self, told: Mapping[str, Any]) -> None:
        """Take note of a line of the engine's answer."""
        layer, status = str(told.get("id") or ""), str(told.get("status") or "")
        detail = told.get("progressDetail") or {}
        if status in ("Pull complete", "Already exists"):
            self._done.add(layer)
        elif status == "Downloading" and detail.get("total"):
            self._seen[layer] = (int(detail.get("current") or 0), int(detail["total"]))
        elif status in ("Verifying Checksum", "Download complete", "Extracting") and layer in self._seen:
            self._seen[layer] = (self._seen[layer][1],) * 2
        elif status in ("Pulling fs layer", "Waiting"):
            self._seen.setdefault(layer, (0, 0))

    def __str__(self) -> str:
        every = self._seen.keys() | self._done
        if not every:
            return ""
        got, total = (sum(numbers) for numbers in zip((0, 0), *self._seen.values(), strict=True))
        percent = f", {100 * got // total} %" if total else ""
        return f": {len(self._done)} of {len(every)} layers{percent}"


async def accounts(engine: Engine, image: Image) -> Accounts:
    """Return the users of an image, read from a container of it that is never started; asked once."""
    read: Accounts = await engine.cached(
        ("accounts", image.id), lambda: engine.do(lambda c: _accounts(c, image.id), patience=60.0)
    )
    return read


def _accounts(client: APIClient, image: str) -> Accounts:
    made = client.create_container(image, ["none"], labels={"gp.look": "accounts"})
    try:
        return Accounts.read(_file(client, made["Id"], "/etc/passwd"), _file(client, made["Id"], "/etc/group"))
    finally:
        client.remove_container(made["Id"], v=True, force=True)


def _file(client: APIClient, container: str, path: str) -> str:
    from docker.errors import NotFound

    try:
        pieces, _ = client.get_archive(container, path)
    except NotFound:
        return ""
    with tarfile.open(fileobj=io.BytesIO(_limited(pieces))) as archive:
        file = next((archive.extractfile(one) for one in archive if one.isfile()), None)
        return file.read().decode("utf-8", "replace") if file is not None else ""


def _limited(pieces: Iterable[bytes]) -> bytes:
    data = b""
    for piece in pieces:
        data += piece
        if len(data) > LARGEST:
            raise Refused(0, "the image's list of users is too long")
    return data
