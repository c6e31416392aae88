"""Make the launcher one file that any Python from 3.8 on can run: `python3 -I -S gp-launcher.pyz ...`."""

from __future__ import annotations

import os
import zipfile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Union

    AnyPath = Union[str, "os.PathLike[str]"]

_SHEBANG = b"#!/usr/bin/env python3\n"
_MAIN = b"import sys\n\nfrom gp_launchers.__main__ import main\n\nsys.exit(main())\n"
_EXCLUDED = ("bundle.py",)


def build(target: AnyPath) -> str:
    """Write the zipapp; the same sources give the same bytes.

    Args:
        target: File to write (0644, atomically).

    Returns:
        Its path.

    Raises:
        OSError: It cannot be written.
    """
    path = os.fspath(target)
    temporary = "%s.%s" % (path, os.urandom(4).hex())
    try:
        with open(temporary, "xb") as file:
            file.write(_SHEBANG)
            with zipfile.ZipFile(file, "w") as archive:
                _add(archive, "__main__.py", _MAIN)
                for name, data in _sources():
                    _add(archive, "gp_launchers/" + name, data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    return path


def _sources() -> list[tuple[str, bytes]]:
    folder = os.path.dirname(os.path.abspath(__file__))
    sources = []
    for name in sorted(os.listdir(folder)):
        if name.endswith(".py") and name not in _EXCLUDED:
            with open(os.path.join(folder, name), "rb") as file:
                sources.append((name, file.read()))
    return sources


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    entry.create_system = 3
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, data, zipfile.ZIP_DEFLATED, 9)
