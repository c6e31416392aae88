"""Make the launcher one file that any Python from 3.8 on can run: `python3 -I -S gp-launcher.pyz ...`.

It holds the sources and, for a Python of the same version as the one that builds, the bytecode of those modules that
come before the kernel: compiling them costs 15 ms. Other versions of Python take the sources.
"""

from __future__ import annotations

import _imp
import importlib.util
import marshal
import os
import zipfile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Union

    AnyPath = Union[str, "os.PathLike[str]"]

_SHEBANG = b"#!/usr/bin/env python3\n"
_MAIN = b"import sys\n\nfrom gp_launchers.__main__ import main\n\nsys.exit(main())\n"
_EXCLUDED = ("bundle.py",)
# What `__main__` imports before the kernel runs; the rest is compiled while the kernel imports itself.
FIRST = (
    "__init__",
    "__main__",
    "command",
    "errors",
    "files",
    "launch",
    "log",
    "options",
    "ports",
    "process",
    "quickjson",
    "secrets_input",
)


def build(target: AnyPath) -> str:
    """Write the zipapp; the same sources give the same bytes on every machine with the same version of Python.

    Args:
        target: File to write (0644, atomically).

    Returns:
        Its path.

    Raises:
        OSError: It cannot be written.
    """
    path = os.fspath(target)
    temporary = f"{path}.{os.urandom(4).hex()}"
    try:
        with open(temporary, "xb") as file:
            file.write(_SHEBANG)
            with zipfile.ZipFile(file, "w") as archive:
                _add(archive, "__main__.py", _MAIN)
                for name, data in _sources():
                    _add(archive, "gp_launchers/" + name, data)
                    if name[:-3] in FIRST:
                        _add(archive, f"gp_launchers/{name}c", _bytecode("gp_launchers/" + name, data))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    return path


def fingerprint() -> str:
    """Return a name for what `build` would write: 12 hexadecimal digits that change with the sources and the Python."""
    import hashlib

    digest = hashlib.sha256(importlib.util.MAGIC_NUMBER)
    for name, data in _sources():
        digest.update(b"%s %d " % (name.encode(), len(data)) + data)
    return digest.hexdigest()[:12]


def _sources() -> list[tuple[str, bytes]]:
    folder = os.path.dirname(os.path.abspath(__file__))
    sources = []
    for name in sorted(os.listdir(folder)):
        if name.endswith(".py") and name not in _EXCLUDED:
            with open(os.path.join(folder, name), "rb") as file:
                sources.append((name, file.read()))
    return sources


def _bytecode(name: str, source: bytes) -> bytes:
    """Return the contents of a pyc that is valid whatever the time of its source (PEP 552, unchecked)."""
    code = compile(source, name, "exec", dont_inherit=True, optimize=2)
    magic = importlib.util.MAGIC_NUMBER
    digest = _imp.source_hash(int.from_bytes(magic, "little"), source)
    # Format 2 has no references to earlier objects; which ones newer formats write depends on what else is in memory.
    return magic + b"\1\0\0\0" + digest + marshal.dumps(code, 2)


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    entry.create_system = 3
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, data, zipfile.ZIP_DEFLATED, 9)
