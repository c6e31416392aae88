"""Make a kernelspec for a backend from one that starts its kernels locally or elsewhere; touches no file."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from traitlets import Container, Dict, TraitType

from ..backend import Backend
from ..errors import ConfigError
from ..install import Kernelspec, Offer, Variant
from ..options import POLICY, WITHOUT_EFFECT, ProvisionerOptions, checked, choose, launch_options
from ..parameters import from_schema
from ..policies import Policy

PYTHON = re.compile(r"python[0-9.]*")
PLAIN_IPYKERNEL = ("-m", "ipykernel_launcher", "-f", "{connection_file}")
DEFAULT_KERNEL_CLASS = "ipykernel.ipkernel.IPythonKernel"
PEER_OPTIONS = frozenset(
    {
        "kernel-id",
        "port-range",
        "response-address",
        "public-key",
        "transport-encryption",
        "kernel-class-name",
        "spark-context-initialization-mode",
    }
)
"""Options of the peer's launchers that gp replaces or translates."""
PEER_LAUNCHERS = ("launch_ipykernel.py", "launch_docker.py")
"""Its launcher of Python kernels, and its script that makes a container of an image that has one."""


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
    notes: list[str] = []
    config = _kept_config(source, target, notes) | options_from(settings, target.backend)
    for key in config.keys() & WITHOUT_EFFECT:
        notes.append(f"{key} has no effect and is left out: {WITHOUT_EFFECT[key]}")
        del config[key]
    choose(config, target.backend, operator)
    argv = _converted(source, notes) if source.old_launcher and config.get("launcher_protocol") != 1 else source.argv
    here = target.backend.runs_command_here(argv, config.get("submit"))
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
        ConfigError: No ``=``, or the value is not accepted. An unknown key is kept: `options.choose` names it best.
    """
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
    return plain if plain.endswith(f"({backend})") else f"{plain} ({backend})"


def _converted(source: Kernelspec, notes: list[str]) -> list[str]:
    """Return a plain ipykernel command for one in the peer's style, which starts one of `PEER_LAUNCHERS`."""
    argv = source.argv
    advice = (
        "take another kernelspec, such as python3, or edit argv so that it is what it would be locally; "
        "or keep the old launcher by --set launcher_protocol=1, if the operator allows it"
    )
    names = [os.path.basename(part) for part in argv[:2]]
    if (
        len(names) < 2
        or not PYTHON.fullmatch(names[0])
        or names[1] not in PEER_LAUNCHERS
        or str(source.spec.get("language", "python")).lower() != "python"
    ):
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
            f"kernelspec {source.name} has {{prefix}}, a folder of this machine: write a path of the far side"
        )


def _paths(argv: Iterable[str], env: Mapping[str, str]) -> list[str]:
    return [part for part in [*argv, *env.values()] if os.path.isabs(part) and os.path.exists(part)]
