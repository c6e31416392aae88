"""``jupyter gp install`` and ``jupyter gp params``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from traitlets import default

from ..errors import ConfigError
from .command import Command
from .tables import say, show


class _Where(argparse.Action):
    """Keeps which of its names was used, for what is said later."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        namespace.where, namespace.where_option = values, option_string


class Install(Command):
    """Makes a kernelspec."""

    name = "jupyter-gp-install"
    verb = "install"
    summary = "Make a kernelspec whose kernels a backend starts, from one that is there."
    usage = "BACKEND (--from KERNELSPEC | --discover) [options]"
    details = "example: jupyter gp install local --from python3 --set launch_timeout=60"

    @default("log_level")
    def _no_warnings(self) -> int:
        return logging.ERROR  # what jupyter_client warns of is among the notes

    def arguments(self, group: argparse._ArgumentGroup) -> None:
        group.add_argument("backend", metavar="BACKEND", help="a backend or provisioner of jupyter gp list")
        source = group.add_mutually_exclusive_group()
        source.add_argument("--from", dest="source", metavar="KERNELSPEC", help="copy this one, a name or a folder")
        source.add_argument("--template", metavar="NAME", help="or fill in a template of the backend's package")
        source.add_argument(
            "--discover", nargs="*", metavar="NAME", help="or show what --host has, or install it ('*')"
        )
        source.add_argument("--refresh", action="store_true", help="update or remove what was discovered")
        group.add_argument(
            "--host",
            "--image",
            dest="where",
            action=_Where,
            metavar="W",
            help="where to discover or refresh; with commas",
        )
        group.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option; repeatable")
        group.add_argument("--parameters", metavar="FILE", help="JSON schema of what users may choose")
        group.add_argument("--python", metavar="PY", help="the far side's Python; default: python3")
        group.add_argument("--name", help="default: KERNELSPEC-BACKEND")
        group.add_argument("--display-name", metavar="TEXT", help="what users see")
        place = group.add_mutually_exclusive_group()
        place.add_argument("--user", action="store_true", help=argparse.SUPPRESS)  # the default
        place.add_argument("--sys-prefix", action="store_true", help="install into this Python environment")
        place.add_argument("--prefix", metavar="DIR", help="install into DIR/share/jupyter/kernels")
        group.add_argument("--replace", action="store_true", help="a kernelspec of that name may go")

    def run(self) -> int:
        from ..install import offer, place, read_kernelspec, template
        from .variant import variant

        args, specs = self.args, self.specs
        target = offer(args.backend)
        prefix = sys.prefix if args.sys_prefix else args.prefix
        parameters = _json_file(args.parameters) if args.parameters else None
        if args.discover is not None or args.refresh:
            from .environments import Environments

            environments = Environments(self, target, prefix)
            return environments.refresh() if args.refresh else environments.discover(args.discover, parameters)
        if args.source:
            source = read_kernelspec(specs, args.source)
        elif args.template:
            source = template(args.template, target.name)
        else:
            raise ConfigError(self._sources(target.name))
        made = variant(
            source,
            target,
            target.cls(config=self.config).operator_policy(),
            settings=args.set,
            python=args.python,
            display_name=args.display_name,
            parameters=parameters,
        )
        name = (args.name or f"{source.name}-{target.backend.name}").lower()
        path = place(specs, name, made, prefix=prefix, replace=args.replace)
        seen = str(path.parent) in specs.kernel_dirs
        notes = [*made.notes, *([] if seen else [f"Jupyter does not look there: set JUPYTER_PATH={path.parents[1]}"])]
        if args.json:
            data = {"name": name, "path": str(path), "provisioner": target.name, "backend": target.backend.name}
            self.print_json({**data, "spec": made.spec, "notes": notes})
            return 0
        say(f"Installed {name} ({made.spec['display_name']}) in {path}")
        for note in notes:
            say(f"note: {note}")
        say(f"Check it with: jupyter gp doctor {name if seen else path}")
        return 0

    def _sources(self, provisioner: str) -> str:
        from ..plugins import plugins

        specs = ", ".join(sorted(self.specs.find_kernel_specs())) or "none"
        templates = ", ".join(made.name for made in plugins().spec_templates() if made.provisioner == provisioner)
        hint = f", or --template NAME, one of: {templates}" if templates else ""
        return f"say --from KERNELSPEC, one of: {specs}{hint}; or look for others by --host HOST --discover"


def _json_file(path: str) -> Mapping[str, Any]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--parameters {path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"--parameters {path}: not a JSON schema object")
    return data


class Params(Command):
    """Shows parameters."""

    name = "jupyter-gp-params"
    verb = "params"
    summary = "Show what a user may choose when a kernel of this kernelspec starts."
    details = """\
A client chooses by variables of its start request. Parameters are opened by the
kernelspec (metadata.parameters) or by the operator (client_parameters)."""

    def arguments(self, group: argparse._ArgumentGroup) -> None:
        group.add_argument("kernelspec", metavar="KERNELSPEC", help="a name, or a folder with kernel.json")

    def run(self) -> int:
        from ..install import offers, read_kernelspec
        from ..parameters import Parameter, from_schema
        from ..policies import opened

        spec = read_kernelspec(self.specs, self.args.kernelspec)
        target = offers().get(spec.provisioner or "")
        if target is None:
            raise ConfigError(f"kernelspec {spec.name} is not started by a backend of gp: nothing can be chosen")
        policy = target.cls(config=self.config).operator_policy()
        own = from_schema(spec.metadata.get("parameters") or {})
        cap = policy.launch_timeout_cap
        timeout = Parameter(
            name="launch_timeout",
            kind="number",
            maximum=int(cap) if cap.is_integer() else cap,
            description="Seconds until a silent start is given up.",
        )
        every = {**opened(policy, own)}
        rows = [
            _row(param, "operator" if name in policy.client_parameters else "kernelspec")
            for name, param in every.items()
        ]
        if timeout.variable not in {param.variable for param in every.values()}:
            rows.append(_row(timeout, "gp"))
        if self.args.json:
            self.print_json({"kernelspec": spec.name, "parameters": rows})
            return 0
        cells = [(r["variable"], r["rule"], _shown(r["default"]), r["opened_by"], r["description"]) for r in rows]
        show(("VARIABLE", "VALUE", "DEFAULT", "OPENED BY", "MEANING"), cells)
        return 0


def _row(param: Any, opened_by: str) -> dict[str, Any]:
    data = {
        name: getattr(param, name)
        for name in ("name", "variable", "kind", "rule", "default", "minimum", "maximum", "pattern", "title")
    }
    description = param.description or param.title
    return {**data, "choices": list(param.choices), "description": description, "opened_by": opened_by}


def _shown(value: Any) -> str:
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
