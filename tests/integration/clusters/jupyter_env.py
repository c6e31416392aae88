"""A Jupyter that nobody else uses: its folders, and kernelspecs put into them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clusters.kernels.cache import cache_root

_LOCAL_PROVISIONER = "gp-local-provisioner"
_HIDDEN = ("JUPYTER_PATH", "JUPYTER_CONFIG_PATH", "XDG_RUNTIME_DIR", "JUPYTER_DEFAULT_PROVISIONER_NAME")


@dataclass(frozen=True)
class JupyterEnv:
    """A home folder with Jupyter's folders in it, and the variables that point there."""

    home: Path
    data_dir: Path
    runtime_dir: Path
    config_dir: Path
    environ: Mapping[str, str]
    """The variables that were set; they are in `os.environ`, so that children have them too."""

    def install_spec(
        self,
        name: str,
        spec: Mapping[str, Any] | Path,
        provisioner: str | None = _LOCAL_PROVISIONER,
        config: Mapping[str, Any] | None = None,
    ) -> Path:
        """Install a kernelspec that a provisioner starts.

        Args:
            name: The kernelspec's new name.
            spec: Contents of a kernel.json, or a kernelspec folder, whose other files come along.
            provisioner: The stanza's `provisioner_name`; None adds no stanza, for a plain local kernel.
            config: The stanza's `config`.

        Returns:
            The folder of the installed kernelspec.
        """
        folder = self.data_dir / "kernels" / name
        if isinstance(spec, Path):
            shutil.copytree(spec, folder)
            contents = json.loads((folder / "kernel.json").read_text())
        else:
            folder.mkdir(parents=True)
            contents = {"display_name": name, "language": "python", **spec}
        if provisioner is not None:
            stanza = {"provisioner_name": provisioner, "config": dict(config or {})}
            contents["metadata"] = {**contents.get("metadata", {}), "kernel_provisioner": stanza}
        (folder / "kernel.json").write_text(json.dumps(contents, indent=1))
        return folder


@contextmanager
def isolated_jupyter() -> Iterator[JupyterEnv]:
    """Set this process's environment to a Jupyter of its own, and back at the end."""
    # Not pytest's tmp_path: an ipc endpoint lies in the runtime folder, and has at most 107 bytes.
    home = Path(tempfile.mkdtemp(prefix="gp-home-"))
    folders = {name: home / name for name in ("data", "run", "config")}
    for folder in folders.values():
        folder.mkdir(mode=0o700)
    environ = {
        "HOME": str(home),
        "JUPYTER_DATA_DIR": str(folders["data"]),
        "JUPYTER_RUNTIME_DIR": str(folders["run"]),
        "JUPYTER_CONFIG_DIR": str(folders["config"]),
        "IPYTHONDIR": str(home / "ipython"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "XDG_CONFIG_HOME": str(home / ".config"),
        "XDG_DATA_HOME": str(home / ".local/share"),
        # Downloads survive the change of HOME.
        "GP_TEST_CACHE": str(cache_root()),
    }
    try:
        with pytest.MonkeyPatch.context() as patch:
            for variable in _HIDDEN:
                patch.delenv(variable, raising=False)
            for variable, value in environ.items():
                patch.setenv(variable, value)
            yield JupyterEnv(
                home=home,
                data_dir=folders["data"],
                runtime_dir=folders["run"],
                config_dir=folders["config"],
                environ=environ,
            )
    finally:
        shutil.rmtree(home, ignore_errors=True)
