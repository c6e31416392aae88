"""Kernelspecs as files: those that are there, plugins' templates, and a new one put in its place."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._markers import hookimpl
from .command import names_our_launcher, placeholders
from .errors import ConfigError

if TYPE_CHECKING:
    from jupyter_client.kernelspec import KernelSpecManager

    from .backend import Backend
    from .provisioner import RemoteProvisioner

PROVISIONERS = "jupyter_client.kernel_provisioners"


@dataclass(frozen=True, kw_only=True)
class SpecTemplate:
    """A kernelspec that a plugin offers for ``jupyter gp install BACKEND --template NAME``.

    Args:
        name: Of the template.
        provisioner: Entry point that it is for.
        spec: The kernel.json.
        description: One line for people.
    """

    name: str
    provisioner: str
    spec: Mapping[str, Any] = field(repr=False)
    description: str = ""


# -- what is there: provisioners and kernelspecs


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A provisioner of ours that is installed.

    Args:
        name: Of the entry point, as in ``provisioner_name`` of kernel.json.
        cls: Its class.
        backend: The backend of its kernels.
    """

    name: str
    cls: type[RemoteProvisioner]
    backend: type[Backend]


def provisioner_entries() -> list[EntryPoint]:
    """Return the kernel provisioners of all installed packages, ours and others, by name."""
    return sorted(entry_points(group=PROVISIONERS), key=lambda entry: entry.name)


def offers() -> dict[str, Offer]:
    """Return the installed provisioners that have a backend of ours, by name; one that is broken is left out."""
    from .plugins import plugins
    from .provisioner import RemoteProvisioner

    found = {}
    for entry in provisioner_entries():
        with contextlib.suppress(Exception):  # another package's fault; `jupyter gp doctor` tells
            cls = entry.load()
            backend = plugins().backends.get(getattr(cls, "backend_name", ""))
            if backend is not None and issubclass(cls, RemoteProvisioner):
                found[entry.name] = Offer(name=entry.name, cls=cls, backend=backend)
    return found


def offer(name: str) -> Offer:
    """Return the provisioner that a backend's or a provisioner's name means.

    Raises:
        ConfigError: None, or several; the text names them.
    """
    known = offers()
    if name in known:
        return known[name]
    of_backend = [made for made in known.values() if made.backend.name == name]
    if len(of_backend) == 1:
        return of_backend[0]
    if of_backend:
        raise ConfigError(f"backend {name} has several provisioners: say {_either(made.name for made in of_backend)}")
    every = sorted({*known, *(made.backend.name for made in known.values())})
    raise ConfigError(f"no backend or provisioner {name!r} is installed{near(name, every)}")


@dataclass(frozen=True)
class Kernelspec:
    """A kernel.json as it lies there, whether or not its provisioner is installed.

    Args:
        name: Of its folder.
        folder: Where its files are; None for a template.
        spec: The content of kernel.json.
    """

    name: str
    folder: Path | None
    spec: Mapping[str, Any] = field(repr=False)

    @property
    def argv(self) -> list[str]:
        return [str(part) for part in self.spec["argv"]]

    @property
    def metadata(self) -> dict[str, Any]:
        found = self.spec.get("metadata")
        return dict(found) if isinstance(found, Mapping) else {}

    @property
    def provisioner(self) -> str | None:
        """Name in the stanza; None for a kernel that starts locally."""
        stanza = self.metadata.get("kernel_provisioner")
        return stanza.get("provisioner_name") if isinstance(stanza, Mapping) else None

    @property
    def config(self) -> dict[str, Any]:
        """The stanza's ``config``."""
        stanza = self.metadata.get("kernel_provisioner")
        config = stanza.get("config") if isinstance(stanza, Mapping) else None
        return dict(config) if isinstance(config, Mapping) else {}

    @property
    def old_launcher(self) -> bool:
        """Whether argv starts a launcher of an older kind, which speaks protocol 1."""
        return "response_address" in placeholders(self.argv) and not names_our_launcher(self.argv)


def read_kernelspec(manager: KernelSpecManager, name: str) -> Kernelspec:
    """Read a kernelspec; unlike jupyter_client also one whose provisioner is not installed.

    Args:
        manager: Knows where kernelspecs are.
        name: Of a kernelspec, or the path of a folder with a kernel.json.

    Raises:
        ConfigError: There is none, or it cannot be read.
    """
    if os.sep in name:
        folder = Path(name).expanduser().resolve()
    else:
        folders = manager.find_kernel_specs()
        if name.lower() not in folders:
            raise ConfigError(f"no kernelspec {name!r}{near(name, sorted(folders))}")
        folder = Path(folders[name.lower()])
    path = folder / "kernel.json"
    spec: Any
    try:
        if os.sep not in name and not path.exists():  # the one that ipykernel brings along has no file
            spec = manager.get_kernel_spec(name).to_dict()
        else:
            spec = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path} cannot be read: {reason}") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("argv"), list) or not spec["argv"]:
        raise ConfigError(f"{path} is no kernelspec: it has no argv")
    if wrong := _wrong(spec):
        raise ConfigError(f"{path} is no kernelspec: {wrong}")
    return Kernelspec(folder.name if os.sep in name else name.lower(), folder, spec)


def _wrong(spec: Mapping[str, Any]) -> str:
    """Return what is of the wrong kind in a kernel.json, or nothing."""
    if not all(isinstance(part, str) for part in spec["argv"]):
        return "its argv holds something else than texts"
    metadata = spec.get("metadata") or {}
    if not isinstance(metadata, dict):
        return "its metadata is no object"
    stanza = metadata.get("kernel_provisioner") or {}
    if not isinstance(stanza, dict) or not isinstance(stanza.get("config") or {}, dict):
        return "its kernel_provisioner, or the config in it, is no object"
    if not isinstance(stanza.get("provisioner_name", ""), str):
        return "its provisioner_name is no text"
    if not isinstance(spec.get("env") or {}, dict):
        return "its env is no object"
    return ""


def template(name: str, provisioner: str) -> Kernelspec:
    """Return a plugin's template as a kernelspec.

    Raises:
        ConfigError: No such template; the text names those that exist.
    """
    from .plugins import plugins

    fitting = {made.name: made for made in plugins().spec_templates() if made.provisioner == provisioner}
    if name not in fitting:
        raise ConfigError(f"{provisioner} has no template {name!r}{near(name, sorted(fitting))}")
    return Kernelspec(name, None, fitting[name].spec)


# -- installing


@dataclass(frozen=True)
class Variant:
    """A new kernelspec that is not installed yet.

    Args:
        spec: The kernel.json.
        folder: Whose other files go with it.
        notes: What the user should know, one line each.
    """

    spec: dict[str, Any]
    folder: Path | None
    notes: list[str]


def kernels_folder(manager: KernelSpecManager, prefix: str | None) -> Path:
    """Return the folder for the kernelspecs of a prefix; None: the user's own."""
    return Path(prefix).absolute() / "share/jupyter/kernels" if prefix else Path(manager.user_kernel_dir)


def place(
    manager: KernelSpecManager, name: str, made: Variant, *, prefix: str | None = None, replace: bool = False
) -> Path:
    """Install a variant with the other files of its source.

    Args:
        manager: Of the kernelspecs.
        name: Of the new one.
        made: What to install.
        prefix: Folder whose ``share/jupyter/kernels`` gets it; None: the user's own.
        replace: Whether one of that name may go.

    Returns:
        Its folder.

    Raises:
        ConfigError: The name cannot be used or is taken, or the folder cannot be written.
    """
    if not re.fullmatch(r"[a-z0-9._-]+", name):
        raise ConfigError(f"{name!r} cannot be the name of a kernelspec: use letters, digits and . _ -")
    parent = kernels_folder(manager, prefix)
    if (parent / name).exists() and not replace:
        raise ConfigError(f"kernelspec {name} exists in {parent}: say --replace, or another --name")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            copy = Path(temporary, name)
            if made.folder is not None:
                shutil.copytree(made.folder, copy, ignore=shutil.ignore_patterns("kernel.json", "__pycache__"))
            else:
                copy.mkdir()
            text = json.dumps(made.spec, indent=1, ensure_ascii=False)
            (copy / "kernel.json").write_text(text + "\n", encoding="utf-8")
            return Path(manager.install_kernel_spec(str(copy), name, user=prefix is None, prefix=prefix))
    except shutil.Error as error:
        raise ConfigError(f"the files of the kernelspec cannot be copied: {error.args[0][0][2]}") from None
    except OSError as error:
        raise ConfigError(
            f"{parent} cannot be written: {error.strerror}; choose another place by --prefix DIR"
        ) from None


def _either(names: Iterable[str]) -> str:
    return " or ".join(sorted(names))


def near(name: str, known: Sequence[str]) -> str:
    """Return a hint for a name that is unknown: the nearest one, or all."""
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(known) or 'none'}"


@hookimpl
def gp_spec_templates() -> list[SpecTemplate]:
    """Offer a Python kernel of this machine."""
    return [
        SpecTemplate(
            name="python",
            provisioner="gp-local-provisioner",
            description="Python on this machine, through the whole protocol",
            spec={
                "argv": ["python3", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                "display_name": "Python 3",
                "language": "python",
            },
        )
    ]
