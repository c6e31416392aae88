"""``jupyter gp doctor``: every check says what it found and what to do."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import EntryPoint
from typing import Any

from rich.table import Table
from rich.text import Text
from traitlets import TraitError
from traitlets.config import Config

from ..backend import Backend, Finding
from ..errors import ConfigError, GPError
from ..install import Kernelspec, Offer, offers, provisioner_entries, read_kernelspec
from ..options import choose
from ..plugins import plugins
from ..server import KernelServer, data_folder
from .check_process import callback_findings, folder_findings, user_findings, variable_findings
from .check_specs import spec_findings
from .command import Command
from .findings import bad, good
from .tables import console, say

DEADLINE = 20.0  # seconds for a backend's own check


class Doctor(Command):
    """Looks for what would keep kernels from starting."""

    name = "jupyter-gp-doctor"
    verb = "doctor"
    summary = "Look for what would keep kernels from starting, and say what to do."
    tells_problems = True
    details = """\
With KERNELSPEC only that one is checked, in detail, and its backend with its
options; with the name of a backend or provisioner, that one with all its
kernelspecs. The exit code is 1 when something is not right."""

    def arguments(self, group: argparse._ArgumentGroup) -> None:
        group.add_argument(
            "what", nargs="?", metavar="KERNELSPEC", help="a name, a folder with kernel.json, or a backend"
        )

    def run(self) -> int:
        known = offers()
        findings = [*plugin_findings(), *clash_findings(provisioner_entries())]
        every = sorted(self.specs.find_kernel_specs())
        what: str = self.args.what or ""
        only = None if what.lower() in every else next((one for one in known.values() if what in _names(one)), None)
        one_spec = what if only is None else ""
        specs: list[Kernelspec] = []
        for name in [one_spec] if one_spec else every:
            try:
                specs.append(read_kernelspec(self.specs, name))
            except ConfigError as error:
                if one_spec:
                    raise
                findings.append(bad(f"kernelspec {name}", str(error), "correct its kernel.json, or remove it"))
        if only is not None:
            specs = [spec for spec in specs if spec.provisioner == only.name]
        server = KernelServer(config=self.config)
        for spec in specs:
            findings += spec_findings(spec, known, self.config, server, in_detail=bool(one_spec))
        if not what:
            far = sum(spec.provisioner in known for spec in specs)
            findings.append(good("kernelspecs", f"{len(specs)} found, {far} of them started by a backend of gp"))
            findings += variable_findings()
        findings += user_findings(server, self.config)
        findings += callback_findings(server)
        findings += folder_findings(data_folder())
        chosen = [spec for spec in specs if spec.provisioner in known] if what else []
        if not one_spec or chosen:
            findings += self.wait(backend_findings(self.config, chosen, known, only))
        well = all(finding.ok for finding in findings)
        if self.args.json:
            self.print_json({"ok": well, "findings": [asdict(finding) for finding in findings]})
        else:
            _show(findings)
        return 0 if well else 1


def _names(one: Offer) -> tuple[str, str]:
    return one.name, one.backend.name


def _show(findings: Sequence[Finding]) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(max_width=22, overflow="fold")
    table.add_column(overflow="fold")
    for finding in sorted(findings, key=lambda finding: not finding.ok):
        mark = Text("ok", "green") if finding.ok else Text("BAD", "bold red")
        table.add_row(mark, finding.subject, finding.text)
        if finding.advice:
            table.add_row("", "", Text(f"-> {finding.advice}", "bold"))
    console().print(table)
    wrong = sum(not finding.ok for finding in findings)
    say(f"\n{wrong} of {len(findings)} checks found something to do." if wrong else "\nEverything is fine.")


# -- what is installed


def plugin_findings() -> list[Finding]:
    """Tell which plugins are not used; one that the operator has disabled is fine."""
    found = []
    for problem in plugins().problems:
        if "GP_DISABLED_PLUGINS" in problem.reason:
            found.append(good(f"plugin {problem.plugin}", problem.reason))
        else:
            advice = "update or reinstall its package, or leave it out by GP_DISABLED_PLUGINS"
            found.append(bad(f"plugin {problem.plugin}", problem.reason, advice))
    offered = ", ".join(f"{name} ({owner})" for name, owner in sorted(plugins().owners.items()))
    return [*found, good("backends", offered)]


def clash_findings(entries: Iterable[EntryPoint]) -> list[Finding]:
    """Tell which provisioner names two packages offer: which of them jupyter_client takes is chance."""
    owners: dict[str, dict[str, str]] = {}
    for entry in entries:
        package = entry.dist.name if entry.dist else entry.module
        owners.setdefault(entry.name, {})[package.lower().replace("_", "-")] = entry.value
    clashes = {name: packages for name, packages in owners.items() if len(packages) > 1}
    found = []
    for name, packages in clashes.items():
        others = [package for package, value in packages.items() if not value.startswith("gp_")]
        text = f"offered by {' and by '.join(sorted(packages))}: which one is used is chance"
        found.append(bad(f"provisioner {name}", text, f"pip uninstall {' '.join(others or packages)}"))
    return found


# -- backends


async def backend_findings(
    config: Config, specs: Sequence[Kernelspec], known: Mapping[str, Offer], only: Offer | None
) -> list[Finding]:
    """Ask backends to check themselves, all at once: every one, or those of kernelspecs with their options, or one."""
    asked: list[tuple[type[Backend], dict[str, Any]]] = [(cls, {}) for cls in plugins().backends.values()]
    if only is not None:
        asked = [(only.backend, {})]
    if specs:
        asked = []
        for spec in specs:
            target = known[spec.provisioner or ""]
            with contextlib.suppress(ConfigError):  # found already
                policy = target.cls(config=config).operator_policy()
                one = (target.backend, choose(spec.config, target.backend, policy).backend)
                asked += [one] if one not in asked else []
    answers = await asyncio.gather(*(_checked(cls, config, options) for cls, options in asked))
    return list(dict.fromkeys(finding for answer in answers for finding in answer))


async def _checked(cls: type[Backend], config: Config, options: Mapping[str, Any]) -> list[Finding]:
    subject = f"backend {cls.name}"
    try:
        return await asyncio.wait_for(cls(config=config, **options).check(), DEADLINE)
    except asyncio.TimeoutError:
        return [bad(subject, f"its check did not end within {DEADLINE:g} s", "look whether its platform answers")]
    except (GPError, TraitError) as error:
        return [bad(subject, str(error), "correct its configuration")]
    except Exception as error:
        text = f"its check failed: {type(error).__name__}: {error}"
        return [bad(subject, text, "report this to the authors of the backend")]
