"""A container image without a registry: this machine's Python with some distributions, bash and a few tools.

All Python code in it is compiled, as a pip in a Dockerfile would do; else every first import takes seconds.
"""

from __future__ import annotations

import hashlib
import io
import os
import py_compile
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import cache_from_source
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from clusters.kernels.cache import cached

SETTINGS = (
    "ENV PATH=/usr/local/bin:/usr/bin:/bin LD_LIBRARY_PATH=/usr/local/lib LANG=C.UTF-8",
    'CMD ["/bin/bash"]',
)
"""For ``docker import -c``."""

TOOLS = (
    "bash", "env", "cat", "ls", "sleep", "id", "hostname", "mkdir", "rm", "cp", "mv", "chmod", "chown", "ln", "ps",
    "grep", "sed", "head", "tail", "tr", "date", "touch", "uname", "yes", "dd", "kill", "true", "false",
)  # fmt: skip
FOLDERS = {"tmp": 0o1777, "var/tmp": 0o1777, **dict.fromkeys(("proc", "sys", "dev", "run", "root", "work"), 0o755)}
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\njovyan:x:1000:100:jovyan:/home/jovyan:/bin/sh\n",
    "etc/group": "root:x:0:\nusers:x:100:\ndata:x:2000:jovyan\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
}
LINKS = {"bin": "usr/bin", "sbin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64", "usr/bin/sh": "bash"}
UNUSED = {"test", "tests", "site-packages", "idlelib", "tkinter", "lib2to3", "ensurepip", "turtledemo", "__pycache__"}
PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"


def python_image(*names: str) -> Path:
    """Return a tar of a file system with some distributions and all that they need, for ``docker import``.

    Args:
        names: Of distributions that are installed here, such as ``ipykernel``.
    """
    found = sorted(closure(names), key=lambda one: one.name)
    versions = [f"{one.name} {one.version}" for one in found]
    content = hashlib.sha256("\n".join([sys.version, Path(__file__).read_text(), *versions]).encode()).hexdigest()
    return cached(f"image-{names[0]}-{content[:12]}", lambda folder: _write(folder / "image.tar", found)) / "image.tar"


def closure(names: Iterable[str]) -> list[Distribution]:
    """Return distributions and those that they need here."""
    found: dict[tuple[str, frozenset[str]], Distribution] = {}
    wanted = [Requirement(name) for name in names]
    for one in wanted:  # grows meanwhile
        key = canonicalize_name(one.name), frozenset(one.extras)
        if key in found:
            continue
        try:
            found[key] = distribution(one.name)
        except PackageNotFoundError:
            continue  # of another platform or Python
        for line in found[key].requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *one.extras)):
                wanted.append(needed)
    return list({key[0]: one for key, one in found.items()}.values())


def _write(target: Path, distributions: Iterable[Distribution]) -> None:
    with target.open("wb") as file, tarfile.open(fileobj=file, mode="w|", bufsize=1 << 20) as tar:
        layer = _Layer(tar)
        for name, mode in FOLDERS.items():
            layer.folder(name, mode)
        layer.folder("home/jovyan", owner=(1000, 100))
        for name, target_of_link in LINKS.items():
            layer.link(name, target_of_link)
        for name, text in FILES.items():
            layer.text(name, text)
        standard = Path(sysconfig.get_paths()["stdlib"])
        python = Path(sys.executable).resolve()
        tools = {name: Path(found).resolve() for name in TOOLS if (found := shutil.which(name, path="/usr/bin:/bin"))}
        layer.file(python, f"usr/local/bin/{PYTHON}")
        for name, path in tools.items():
            layer.file(path, f"usr/bin/{name}")
        for name in ("python3", "python"):
            layer.link(f"usr/local/bin/{name}", PYTHON)
        files = {
            os.path.normpath(f"usr/local/lib/{PYTHON}/site-packages/{name}"): Path(str(one.locate_file(name)))
            for one in distributions
            for name in one.files or ()
            if "__pycache__" not in name.parts and name.parts[:4] != ("..", "..", "..", "bin")
        }
        extensions = [path for path in files.values() if path.suffix == ".so" and path.is_file()]
        for path in _libraries([python, *tools.values(), *standard.glob("lib-dynload/*.so"), *extensions]):
            if path.is_relative_to(sys.base_prefix):
                layer.file(path.resolve(), f"usr/local/lib/{path.name}")
            elif path.is_relative_to("/usr") or not path.is_relative_to(sys.prefix):
                layer.file(path.resolve(), f"usr{str(path).removeprefix('/usr')}")
        with tempfile.TemporaryDirectory() as scratch:
            compiled = Path(scratch) / "compiled.pyc"
            for path in _modules(standard):
                layer.module(path, f"usr/local/lib/{PYTHON}/{path.relative_to(standard)}", compiled)
            for name, path in files.items():
                if path.is_file():
                    layer.module(path, name, compiled)


def _modules(standard: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(standard):
        folders[:] = [name for name in folders if name not in UNUSED and not name.startswith("config-")]
        for name in files:
            if not name.endswith(".a"):
                yield Path(root, name)


def _libraries(binaries: Iterable[Path]) -> set[Path]:
    """Shared libraries that programs need, under the names by which they are looked up."""
    told = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True).stdout
    found = {Path(word) for word in told.split() if word.startswith("/") and ".so" in word and not word.endswith(":")}
    beside = next(path for path in found if path.name == "libc.so.6").parent
    return found | {beside / name for name in ("libnss_files.so.2", "libnss_dns.so.2", "libresolv.so.2")}


class _Layer:
    """Writes files into a tar, and the folders above them."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self._seen: set[str] = set()

    def folder(self, name: str, mode: int = 0o755, owner: tuple[int, int] = (0, 0)) -> None:
        if name and name not in self._seen:
            info = self._info(name)
            info.type, info.mode = tarfile.DIRTYPE, mode
            info.uid, info.gid = owner
            self._tar.addfile(info)

    def link(self, name: str, target: str) -> None:
        info = self._info(name)
        info.type, info.linkname = tarfile.SYMTYPE, target
        self._tar.addfile(info)

    def text(self, name: str, text: str) -> None:
        info = self._info(name)
        info.size = len(text.encode())
        self._tar.addfile(info, io.BytesIO(text.encode()))

    def file(self, path: Path, name: str) -> None:
        if name in self._seen:
            return
        info, status = self._info(name), path.stat()
        info.size, info.mode, info.mtime = status.st_size, status.st_mode & 0o755, int(status.st_mtime)
        with path.open("rb") as data:
            self._tar.addfile(info, data)

    def module(self, path: Path, name: str, scratch: Path) -> None:
        self.file(path, name)
        if path.suffix == ".py" and (cache := cache_from_source(name)) not in self._seen:
            try:
                py_compile.compile(str(path), str(scratch), dfile=f"/{name}", doraise=True)
            except (py_compile.PyCompileError, UnicodeDecodeError):
                return  # a template
            self.file(scratch, cache)

    def _info(self, name: str) -> tarfile.TarInfo:
        self.folder(os.path.dirname(name))
        self._seen.add(name)
        info = tarfile.TarInfo(name)
        info.mode = 0o644
        return info
