"""Make kernelspecs: the stanza added to a copy of an existing one, or a plugin's template filled in."""

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
    from traitlets import TraitType

    from .backend import Backend
    from .policies import Policy
    from .provisioner import RemoteProvisioner

PROVISIONERS = "jupyter_client.kernel_provisioners"
PYTHON = re.compile(r"python[0-9.]*")
PLAIN_IPYKERNEL = ("-m", "ipykernel_launcher", "-f", "{connection_file}")
DEFAULT_KERNEL_CLASS = "ipykernel.ipkernel.IPythonKernel"


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
    """Return the installed provisioners that have a backend of ours, by name; one that cannot be imported is left out."""
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
    raise ConfigError(f"no backend or provisioner {name!r} is installed{_near(name, every)}")


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
        return [str(part) for part in self.spec.get("argv") or ()]

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
            raise ConfigError(f"no kernelspec {name!r}{_near(name, sorted(folders))}")
        folder = Path(folders[name.lower()])
    path = folder / "kernel.json"
    try:
        if os.sep not in name and not path.exists():  # the one that ipykernel brings along has no file
            spec = manager.get_kernel_spec(name).to_dict()
        else:
            spec = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read: {reason}") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("argv"), list) or not spec["argv"]:
        raise ConfigError(f"{path} is no kernelspec: it has no argv")
    return Kernelspec(folder.name if os.sep in name else name.lower(), folder, spec)


def template(name: str, provisioner: str) -> Kernelspec:
    """Return a plugin's template as a kernelspec.

    Raises:
        ConfigError: No such template; the text names those that exist.
    """
    from .plugins import plugins

    fitting = {made.name: made for made in plugins().spec_templates() if made.provisioner == provisioner}
    if name not in fitting:
        raise ConfigError(f"{provisioner} has no template {name!r}{_near(name, sorted(fitting))}")
    return Kernelspec(name, None, fitting[name].spec)


# -- making a variant


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


def variant(
    source: Kernelspec,
    target: Offer,
    operator: Policy,
    *,
    settings: Sequence[str] = (),
    python: str | None = None,
    display_name: str | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Variant:
    """Make a kernelspec whose kernels are started by a backend, from one that starts them locally or elsewhere.

    Args:
        source: Is not changed.
        target: Provisioner that the new one names.
        operator: Policy that the new one may narrow.
        settings: ``key=value`` for its ``config``.
        python: New ``argv[0]`` of a Python kernel.
        display_name: Default: the source's with the backend's name.
        parameters: JSON schema of what clients may choose.

    Raises:
        ConfigError: It could not work; the text says what to do.
    """
    from .options import WITHOUT_EFFECT, choose
    from .parameters import from_schema

    notes: list[str] = []
    config = _kept_config(source, target, notes) | options_from(settings, target.backend)
    for key in config.keys() & WITHOUT_EFFECT:
        notes.append(f"{key} has no effect and is left out: {WITHOUT_EFFECT[key]}")
        del config[key]
    choose(config, target.backend, operator)
    argv = _converted(source, notes) if source.old_launcher and config.get("launcher_protocol") != 1 else source.argv
    by_script = config.get("submit", "script" if "response_address" in placeholders(argv) else "api") == "script"
    here = target.backend.runs_here or by_script
    argv = _far_argv(argv, here=here, python=python, notes=notes)
    env = {str(key): str(value) for key, value in (source.spec.get("env") or {}).items()}
    if not here:
        _check_files(source, [*argv, *env.values()], target.backend.name)
        notes += [
            f"{part} is a path of this machine: it must exist on the far side too" for part in _paths(argv[1:], env)
        ]
    metadata = source.metadata
    metadata["kernel_provisioner"] = {"provisioner_name": target.name, "config": config}
    if parameters is not None:
        metadata["parameters"] = dict(parameters)
    from_schema(metadata.get("parameters") or {})
    shown = display_name or _display_name(source, target.backend.name)
    return Variant({**source.spec, "argv": argv, "display_name": shown, "metadata": metadata}, source.folder, notes)


def options_from(settings: Iterable[str], backend: type[Backend]) -> dict[str, Any]:
    """Read ``key=value`` texts; a value gets the type of its option, a list is separated by commas.

    Raises:
        ConfigError: No ``=``, or the value is not accepted. An unknown key is kept, because `options.choose` names it best.
    """
    from .options import POLICY, ProvisionerOptions, checked, launch_options

    known = launch_options(backend)
    known |= {name: trait for name, trait in ProvisionerOptions.class_traits(config=True).items() if name in POLICY}
    chosen: dict[str, Any] = {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator:
            raise ConfigError(f"--set {setting}: say key=value")
        key = key.strip()
        chosen[key] = checked(key, _typed(known[key], text), known[key]) if key in known else text
    return chosen


def _typed(trait: TraitType[Any, Any], text: str) -> Any:
    from traitlets import Container, Dict

    if isinstance(trait, (Container, Dict)) and text.strip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):
            return json.loads(text)
    if isinstance(trait, Container):
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _kept_config(source: Kernelspec, target: Offer, notes: list[str]) -> dict[str, Any]:
    if source.provisioner in (None, target.name):
        return source.config
    notes.append(f"the stanza of {source.provisioner} is replaced, and its config is not kept")
    return {}


def _display_name(source: Kernelspec, backend: str) -> str:
    plain = re.sub(r"\s*\(ipykernel\)$", "", str(source.spec.get("display_name") or source.name))
    return f"{plain} ({backend})"


def _converted(source: Kernelspec, notes: list[str]) -> list[str]:
    """Return a plain ipykernel command for one in the peer's style, which starts its launch_ipykernel.py."""
    argv = source.argv
    advice = (
        "take another kernelspec, such as python3, or edit argv so that it is what it would be locally; "
        "or keep the old launcher by --set launcher_protocol=1, if the operator allows it"
    )
    names = [os.path.basename(part) for part in argv[:2]]
    if len(names) < 2 or not PYTHON.fullmatch(names[0]) or names[1] != "launch_ipykernel.py":
        raise ConfigError(
            f"kernelspec {source.name} starts a launcher of an older kind in a way that is not known: {advice}"
        )
    extra: list[str] = []
    for key, value in _peer_options(argv[2:]):
        if key == "kernel-class-name" and value != DEFAULT_KERNEL_CLASS:
            extra.append(f"--IPKernelApp.kernel_class={value}")
        elif key == "spark-context-initialization-mode" and value not in ("none", ""):
            raise ConfigError(
                f"kernelspec {source.name} has its launcher make a Spark context ({key} {value}): {advice}"
            )
        elif key not in PEER_OPTIONS:
            raise ConfigError(f"kernelspec {source.name} gives its launcher the unknown option --{key}: {advice}")
    notes.append(
        f"the old launcher in argv ({names[1]}) is replaced by plain ipykernel: gp brings its own launcher along"
    )
    return [argv[0], *PLAIN_IPYKERNEL, *extra]


PEER_OPTIONS = frozenset(
    {
        "kernel-id",
        "port-range",
        "response-address",
        "public-key",
        "kernel-class-name",
        "spark-context-initialization-mode",
    }
)
"""Options of the peer's launch_ipykernel.py that gp replaces or translates."""


def _peer_options(parts: Sequence[str]) -> Iterable[tuple[str, str]]:
    waiting = iter(parts)
    for part in waiting:
        key, separator, value = part.partition("=")
        # Enterprise Gateway wrote --RemoteProcessProxy.kernel-id
        yield key.lstrip("-").removeprefix("RemoteProcessProxy."), value if separator else next(waiting, "")


def _far_argv(argv: Sequence[str], *, here: bool, python: str | None, notes: list[str]) -> list[str]:
    first, rest = argv[0], argv[1:]
    command = os.path.basename(first)
    is_python = PYTHON.fullmatch(command) is not None
    if python is not None:
        if not is_python:
            raise ConfigError(f"--python: the kernelspec starts {command}, which is no Python")
        return [python, *rest]
    if here or not (os.path.isabs(first) or first == "python"):
        return list(argv)
    there = "python3" if is_python else command
    notes.append(
        f"{first} becomes {there}, which must be on the far side's PATH" + (" (see --python)" if is_python else "")
    )
    return [there, *rest]


def _check_files(source: Kernelspec, parts: Iterable[str], backend: str) -> None:
    own = [re.sub(r".*\{resource_dir\}/?", "", part) or "all" for part in parts if "{resource_dir}" in part]
    if own:
        raise ConfigError(
            f"kernelspec {source.name} uses files of its own folder ({', '.join(own)}), which {backend} cannot bring "
            "to the far side: put them there and write their path there instead of {resource_dir}"
        )
    if any("{prefix}" in part for part in parts):
        raise ConfigError(
            f"kernelspec {source.name} has {{prefix}}, the folder of this machine's Python: write a path of the far side"
        )


def _paths(argv: Iterable[str], env: Mapping[str, str]) -> list[str]:
    return [part for part in [*argv, *env.values()] if os.path.isabs(part) and os.path.exists(part)]


# -- installing


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
    parent = Path(prefix).absolute() / "share/jupyter/kernels" if prefix else Path(manager.user_kernel_dir)
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


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(known) or 'none'}"


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
                "display_name": "Python 3 (gp)",
                "language": "python",
            },
        )
    ]
