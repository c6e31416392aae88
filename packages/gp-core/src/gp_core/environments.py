"""Kernels that a backend has found on far sides, as kernelspecs; and what became of them since."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BackendError, ConfigError
from .install import Kernelspec, Variant, read_kernelspec

if TYPE_CHECKING:
    from jupyter_client.kernelspec import KernelSpecManager

MARK = "gp_environment"  # in a kernelspec's metadata: where it was found
UNSAFE = re.compile(r"[^a-z0-9._-]+")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A kernel that could be started on a far side.

    Args:
        name: Of the environment or kernelspec over there.
        display_name: What users see, without the place.
        argv: Command, with paths of the far side.
        origin: Where it is over there: a folder.
        language: Of the kernel.
        env: Variables; ``${X}`` is filled over there.
        interrupt_mode: "signal" or "message".
        config: Options of the backend that lead there.
    """

    name: str
    display_name: str
    argv: Sequence[str]
    origin: str
    language: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    interrupt_mode: str = "signal"
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, told: Mapping[str, Any], *, config: Mapping[str, Any]) -> Environment:
        """Read what a far side has told.

        Args:
            told: The fields but ``config``.
            config: Options of the backend that lead there.

        Raises:
            BackendError: It is none.
        """
        try:
            argv, env = told["argv"], told.get("env", {})
            texts = {name: told[name] for name in ("name", "display_name", "origin", "language", "interrupt_mode")}
            words = [*texts.values(), *argv, *env, *env.values()]
            if not argv or not isinstance(argv, list) or not all(isinstance(word, str) for word in words):
                raise TypeError
        except (KeyError, TypeError, AttributeError):
            raise BackendError(f"the far side tells of an environment in a way that is not known: {told!r}") from None
        shown = {name: "".join(one for one in text if one.isprintable()) for name, text in texts.items()}
        return cls(**shown, argv=list(argv), env=dict(env), config=config)

    def kernelspec(self, where: str, provisioner: str) -> dict[str, Any]:
        """Return the kernel.json that starts it.

        Args:
            where: Place where it was found, such as a host.
            provisioner: Entry point of the backend.
        """
        stanza = {"provisioner_name": provisioner, "config": dict(self.config)}
        return {
            "argv": list(self.argv),
            "display_name": f"{self.display_name} @ {where}",
            "language": self.language,
            "interrupt_mode": self.interrupt_mode,
            "env": dict(self.env),
            "metadata": {"kernel_provisioner": stanza, MARK: {"where": where, "origin": self.origin}},
        }


def named(where: str, found: Iterable[Environment]) -> dict[str, Environment]:
    """Return environments of one place by the names of the kernelspecs for them; equal names get numbers."""
    names: dict[str, Environment] = {}
    for one in found:
        name = base = UNSAFE.sub("-", f"{where}-{one.name}".lower()).strip("-.")
        number = 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names[name] = one
    return names


def installed(manager: KernelSpecManager, provisioner: str, folder: Path) -> dict[str, list[Kernelspec]]:
    """Return the kernelspecs that were made from environments, by the place where those were found.

    Args:
        manager: Knows where kernelspecs are.
        provisioner: That starts them.
        folder: That holds them; others are not ours to change.
    """
    places: dict[str, list[Kernelspec]] = {}
    for name, path in sorted(manager.find_kernel_specs().items()):
        if Path(path).parent != folder:
            continue
        try:
            spec = read_kernelspec(manager, name)
        except ConfigError:
            continue  # doctor's business
        mark = spec.metadata.get(MARK)
        if spec.provisioner == provisioner and isinstance(mark, dict) and isinstance(mark.get("where"), str):
            places.setdefault(mark["where"], []).append(spec)
    return places


def renewed(spec: Kernelspec, found: Iterable[Environment]) -> Variant | None:
    """Return a kernelspec as it should be now, with what people have changed in it; None: its environment has gone.

    Args:
        spec: Made from an environment.
        found: What is there now.
    """
    origin = spec.metadata[MARK].get("origin")
    here = [one for one in found if one.origin == origin]
    now = next((one for one in here if _module(one.argv) == _module(spec.argv)), None)
    if now is None:
        return None
    env = {**(spec.spec.get("env") or {}), **now.env}
    made = {**spec.spec, "argv": list(now.argv), "language": now.language, "env": env}
    return Variant(json.loads(json.dumps(made)), spec.folder, [])


def _module(argv: Sequence[str]) -> Sequence[str]:
    return [word for word in argv[1:] if not word.startswith("-X")]
