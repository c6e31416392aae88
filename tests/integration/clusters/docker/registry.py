"""A registry on an engine's own machine, where engines take one without TLS; people log in, or not."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import bcrypt

from clusters.availability import Unavailable
from clusters.docker.engine import Engine

LOGIN = ("reader", "secret of the registry")
CONFIG = """
version: 0.1
log: {{level: warn}}
storage: {{filesystem: {{rootdirectory: {folder}/blobs}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
{auth}
"""
AUTH = "auth: {{htpasswd: {{realm: gp, path: {folder}/htpasswd}}}}"


class Registry:
    """One registry.

    Args:
        engine: On whose machine it runs; it ends with it.
        port: Of its loopback.
        closed: Only who logs in by `LOGIN` gets anything.
    """

    def __init__(self, engine: Engine, port: int, *, closed: bool = False) -> None:
        self.name = f"127.0.0.1:{port}"
        self._engine, self._port, self._closed = engine, port, closed
        self._folder = engine.folder / f"registry-{port}"

    def up(self) -> None:
        """Start it.

        Raises:
            Unavailable: There is none here.
        """
        if not (program := shutil.which("docker-registry")):
            raise Unavailable("needs: apt-get install docker-registry")
        self._folder.mkdir()
        auth = AUTH.format(folder=self._folder) if self._closed else ""
        (self._folder / "config.yml").write_text(CONFIG.format(folder=self._folder, port=self._port, auth=auth))
        hashed = bcrypt.hashpw(LOGIN[1].encode(), bcrypt.gensalt(4)).decode()
        (self._folder / "htpasswd").write_text(f"{LOGIN[0]}:{hashed}\n")
        self._engine.inside(
            "sh", "-c", f"cd {self._folder}; {program} serve config.yml >log 2>&1 & echo $! >pid", check=True
        )
        deadline = time.monotonic() + 20
        while not self._answers():
            if time.monotonic() > deadline:
                raise RuntimeError(f"no registry: {(self._folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        with suppress(RuntimeError):
            self._engine.inside("bash", "-c", f": </dev/tcp/127.0.0.1/{self._port}")
            return True
        return False

    def filled(self, image: str, name: str) -> str:
        """Put an image of the engine there, remove it from the engine, and return its name in the registry."""
        full = f"{self.name}/{name}"
        login = dict(zip(("username", "password"), LOGIN, strict=True))
        with self._engine.client() as client:
            client.tag(image, full)
            for told in client.push(full, stream=True, decode=True, auth_config=login):
                if "error" in told:
                    raise RuntimeError(told["error"])
            client.remove_image(full)
        return full

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """It accepts connections and says nothing."""
        self._signal("STOP")
        try:
            yield
        finally:
            self._signal("CONT")

    def down(self) -> None:
        """End it."""
        self._signal("KILL")

    def _signal(self, name: str) -> None:
        pid = Path(self._folder, "pid").read_text().strip()
        self._engine.inside("kill", f"-{name}", pid, check=False)
