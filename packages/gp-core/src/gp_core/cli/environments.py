"""``jupyter gp install BACKEND --discover`` and ``--refresh``: kernels that are out there, as kernelspecs."""

from __future__ import annotations

import asyncio
import fnmatch
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..environments import Environment, installed, named, renewed
from ..errors import ConfigError, GPError
from ..install import Kernelspec, Offer, Variant, kernels_folder, near, place
from ..options import choose
from .tables import say, show
from .variant import options_from

if TYPE_CHECKING:
    from .command import Command

Looked = dict[str, Sequence[Environment] | GPError]


class Environments:
    """What is asked of one backend.

    Args:
        command: With the arguments of `kernelspecs.Install`.
        target: Provisioner for the kernelspecs.
        prefix: Where they are; None: the user's own.
    """

    def __init__(self, command: Command, target: Offer, prefix: str | None) -> None:
        self._command = command
        self._args = command.args
        self._target = target
        self._prefix = prefix
        self._specs = command.specs
        self._settings = options_from(self._args.set, target.backend)
        self._rows: list[dict[str, Any]] = []

    def discover(self, patterns: Sequence[str], parameters: Mapping[str, Any] | None) -> int:
        """Show what is there; or install what has one of some names."""
        places = [one.strip() for one in (self._args.where or "").split(",") if one.strip()]
        if not places:
            raise ConfigError("say where to look: --host HOST or --image IMAGE, several separated by commas")
        looked = self._command.wait(self._look(dict.fromkeys(places, self._settings)))
        every = {
            name: (where, one) for where, found in good(looked).items() for name, one in named(where, found).items()
        }
        chosen = [name for name in every if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        if patterns and not chosen and every:
            raise ConfigError(
                f"nothing that was found is called {' or '.join(patterns)}{near(patterns[0], list(every))}"
            )
        for name, (where, one) in every.items():
            self._row(name, one.kernelspec(where, self._target.name)["display_name"], one.origin, self._state(name))
            if name in chosen:
                self._try(name, partial(self._install, name, where, one, parameters))
        return self._told(looked, asked=not patterns)

    def refresh(self) -> int:
        """Bring what was installed up to date, and remove what has gone; where nobody answers nothing changes."""
        folder = kernels_folder(self._specs, self._prefix)
        there = installed(self._specs, self._target.name, folder)
        wanted = [one.strip() for one in (self._args.where or "").split(",") if one.strip()] or list(there)
        looked = self._command.wait(
            self._look({where: self._reach(there[where][0]) for where in wanted if where in there})
        )
        for where, found in good(looked).items():
            for spec in there[where]:
                self._row(
                    spec.name, spec.spec.get("display_name"), spec.metadata["gp_environment"].get("origin"), "kept"
                )
                self._try(spec.name, partial(self._renew, spec, found))
        return self._told(looked, asked=False)

    # -- parts

    def _reach(self, spec: Kernelspec) -> dict[str, Any]:
        return {**spec.config, **self._settings}

    async def _look(self, places: Mapping[str, Mapping[str, Any]]) -> Looked:
        operator = self._target.cls(config=self._command.config).operator_policy()

        async def at(where: str, config: Mapping[str, Any]) -> Sequence[Environment] | GPError:
            try:
                options = choose(config, self._target.backend, operator).backend
                return await self._target.backend(config=self._command.config, **options).environments(where)
            except GPError as error:
                return error

        said = await asyncio.gather(*(at(where, config) for where, config in places.items()))
        return dict(zip(places, said, strict=True))

    def _state(self, name: str) -> str:
        return "yes" if (kernels_folder(self._specs, self._prefix) / name).exists() else "no"

    def _row(self, name: str, shown: Any, origin: Any, state: str) -> None:
        self._rows.append({"name": name, "display_name": str(shown), "origin": str(origin), "state": state})

    def _try(self, name: str, act: Callable[[], str]) -> None:
        try:
            self._rows[-1]["state"] = act()
        except ConfigError as error:
            self._rows[-1]["state"] = "failed"
            sys.stderr.write(f"note: {name}: {error}\n")

    def _install(self, name: str, where: str, one: Environment, parameters: Mapping[str, Any] | None) -> str:
        if self._rows[-1]["state"] == "yes" and not self._args.replace:
            return "was there"
        spec = one.kernelspec(where, self._target.name)
        config = spec["metadata"]["kernel_provisioner"]["config"] = {**one.config, **self._settings}
        choose(config, self._target.backend, self._target.cls(config=self._command.config).operator_policy())
        if parameters is not None:
            spec["metadata"]["parameters"] = dict(parameters)
        place(self._specs, name, Variant(spec, None, []), prefix=self._prefix, replace=self._args.replace)
        return "installed"

    def _renew(self, spec: Kernelspec, found: Sequence[Environment]) -> str:
        made = renewed(spec, found)
        assert spec.folder is not None
        try:
            if made is None:
                self._specs.remove_kernel_spec(spec.name)
                return "removed"
            if made.spec == dict(spec.spec):
                return "kept"
            text = json.dumps(made.spec, indent=1, ensure_ascii=False)
            Path(spec.folder, "kernel.json").write_text(text + "\n", encoding="utf-8")
            return "updated"
        except OSError as error:
            raise ConfigError(f"{spec.folder} cannot be changed: {error.strerror}") from None

    def _told(self, looked: Looked, *, asked: bool) -> int:
        failed = {where: str(error) for where, error in looked.items() if isinstance(error, GPError)}
        code = int(bool(failed) or any(row["state"] == "failed" for row in self._rows))
        if self._args.json:
            self._command.print_json({"kernelspecs": self._rows, "failed": failed})
            return code
        if self._rows:
            cells = [(row["name"], row["display_name"], row["origin"], row["state"]) for row in self._rows]
            show(("NAME", "KERNEL", "WHERE IT IS", "INSTALLED"), cells)
        elif not failed:
            say("There is nothing." if looked else "Nothing was installed by --discover.")
        for where, text in failed.items():
            sys.stderr.write(f"note: {text}\n" if text.startswith(where) else f"note: {where}: {text}\n")
        if asked and self._rows:
            where = f"{self._args.where_option} {self._args.where}"
            say(f"Install some with: jupyter gp install {self._args.backend} {where} --discover NAME…")
        return code


def good(looked: Looked) -> dict[str, Sequence[Environment]]:
    """Return what was found where somebody answered."""
    return {where: found for where, found in looked.items() if not isinstance(found, GPError)}
