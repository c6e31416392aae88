"""``jupyter gp doctor``: every check says what it found and what to do."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import getpass
import os
import socket
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text
from traitlets import TraitError
from traitlets.config import Config

from ..backend import Backend, Finding
from ..errors import ConfigError, GPError
from .command import Command
from .tables import console, say

if TYPE_CHECKING:
    from ..install import Kernelspec, Offer
    from ..server import KernelServer
    from ..store import FileStore

PACKAGES = {
    "distributed-provisioner": "gp-ssh",
    "docker-provisioner": "gp-docker",
    "docker-swarm-provisioner": "gp-docker",
    "kubernetes-provisioner": "gp-k8s",
    "spark-operator-provisioner": "gp-k8s",
    "yarn-provisioner": "gp-yarn",
    "gp-local-provisioner": "gp-core",
}
"""Which package offers a provisioner that people may have in their kernelspecs."""

DEADLINE = 20.0  # seconds for a backend's own check
CONNECT = 2.0  # seconds for a connection to an address of this machine


class Doctor(Command):
    """Looks for what would keep kernels from starting."""

    name = "jupyter-gp-doctor"
    verb = "doctor"
    summary = "Look for what would keep kernels from starting, and say what to do."
    details = """\
With KERNELSPEC only that one is checked, in detail, and its backend with its
options. The exit code is 1 when something is not right."""

    def arguments(self, group: argparse._ArgumentGroup) -> None:
        group.add_argument("kernelspec", nargs="?", metavar="KERNELSPEC", help="a name, or a folder with kernel.json")

    def run(self) -> int:
        from ..install import offers, provisioner_entries, read_kernelspec
        from ..server import KernelServer, data_folder

        known = offers()
        findings = [*plugin_findings(), *clash_findings(provisioner_entries())]
        names = [self.args.kernelspec] if self.args.kernelspec else sorted(self.specs.find_kernel_specs())
        specs: list[Kernelspec] = []
        for name in names:
            try:
                specs.append(read_kernelspec(self.specs, name))
            except ConfigError as error:
                if self.args.kernelspec:
                    raise
                findings.append(bad(f"kernelspec {name}", str(error), "correct its kernel.json, or remove it"))
        server = KernelServer(config=self.config)
        for spec in specs:
            findings += spec_findings(spec, known, self.config, server, in_detail=bool(self.args.kernelspec))
        if not self.args.kernelspec:
            far = sum(spec.provisioner in known for spec in specs)
            findings.append(good("kernelspecs", f"{len(specs)} found, {far} of them started by a backend of gp"))
        findings += user_findings(server, self.config)
        findings += callback_findings(server)
        findings += folder_findings(data_folder())
        chosen = [spec for spec in specs if spec.provisioner in known] if self.args.kernelspec else []
        if not self.args.kernelspec or chosen:
            findings += self.wait(backend_findings(self.config, chosen, known))
        well = all(finding.ok for finding in findings)
        if self.args.json:
            self.print_json({"ok": well, "findings": [asdict(finding) for finding in findings]})
        else:
            _show(findings)
        return 0 if well else 1


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


def good(subject: str, text: str) -> Finding:
    return Finding(ok=True, subject=subject, text=text)


def bad(subject: str, text: str, advice: str) -> Finding:
    return Finding(ok=False, subject=subject, text=text, advice=advice)


# -- what is installed


def plugin_findings() -> list[Finding]:
    """Tell which plugins are not used; one that the operator has disabled is fine."""
    from ..plugins import plugins

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


# -- kernelspecs


def spec_findings(
    spec: Kernelspec, known: Mapping[str, Offer], config: Config, server: KernelServer, *, in_detail: bool
) -> list[Finding]:
    """Check one kernelspec without starting anything."""
    subject, name = f"kernelspec {spec.name}", spec.provisioner
    if name is not None and name not in known:
        missing = _provisioner_missing(subject, name)
        return [missing] if missing else _local(spec, in_detail)
    if name is None:
        return _local(spec, in_detail)
    target = known[name]
    found = _launcher_findings(spec, name, server)
    found += _options_findings(spec, target, config, in_detail=in_detail)
    try:
        found += _parameter_findings(spec, in_detail=in_detail)
    except ConfigError as error:
        found.append(bad(subject, str(error), "correct metadata.parameters in its kernel.json"))
    if "{resource_dir}" in " ".join(spec.argv) and "response_address" not in " ".join(spec.argv):
        if not target.backend.runs_here and spec.config.get("submit") != "script":
            text = "argv has {resource_dir}, a folder of this machine"
            found.append(bad(subject, text, "put its files on the far side and write their path there"))
    return found


def _local(spec: Kernelspec, in_detail: bool) -> list[Finding]:
    subject = f"kernelspec {spec.name}"
    if spec.provisioner is None and spec.old_launcher:
        text = "argv starts a launcher, but no provisioner is named"
        return [bad(subject, text, f"jupyter gp install BACKEND --from {spec.name} makes one that works")]
    return [good(subject, "its kernels start locally, without gp")] if in_detail else []


def _provisioner_missing(subject: str, name: str) -> Finding | None:
    from ..install import provisioner_entries

    entries = [entry for entry in provisioner_entries() if entry.name == name]
    if not entries:
        package = PACKAGES.get(name)
        advice = f"pip install {package}" if package else "install the package that offers it, or remove the stanza"
        return bad(subject, f"its provisioner {name} is not installed", advice)
    try:
        cls = entries[0].load()
    except Exception as error:
        package = entries[0].dist.name if entries[0].dist else entries[0].value
        text = f"its provisioner {name} cannot be imported: {type(error).__name__}: {error}"
        return bad(subject, text, f"reinstall {package}")
    if name in PACKAGES and not hasattr(cls, "backend_name"):
        text = f"its provisioner {name} comes from {entries[0].module.split('.')[0]}, not from gp"
        return bad(subject, text, f"pip install {PACKAGES[name]}, and uninstall the other")
    backend = getattr(cls, "backend_name", None)
    if isinstance(backend, str):
        return bad(subject, f"its backend {backend} is not there", "see the plugins above")
    return None  # another package's, such as jupyter_client's own


def _launcher_findings(spec: Kernelspec, provisioner: str, server: KernelServer) -> list[Finding]:
    subject = f"kernelspec {spec.name}"
    if not spec.old_launcher:
        return []
    if spec.config.get("launcher_protocol") != 1:
        advice = f"jupyter gp install {provisioner} --from {spec.name}"
        return [bad(subject, "argv starts a launcher of an older kind, which is refused", advice)]
    if not server.allow_protocol_1:
        advice = f"set GP_ALLOW_PROTOCOL_1=1 for the server, or jupyter gp install {provisioner} --from {spec.name}"
        return [bad(subject, "its launcher speaks protocol 1, which is not allowed here", advice)]
    return []


def _options_findings(spec: Kernelspec, target: Offer, config: Config, *, in_detail: bool) -> list[Finding]:
    from ..options import choose

    subject = f"kernelspec {spec.name}"
    try:
        chosen = choose(spec.config, target.backend, target.cls(config=config).operator_policy())
    except ConfigError as error:
        return [bad(subject, str(error), "correct the stanza in its kernel.json")]
    found = [good(subject, f"{key} has no effect: {why}") for key, why in chosen.ignored.items() if in_detail]
    if in_detail:
        values = ", ".join(f"{key}={value}" for key, value in spec.config.items() if key not in chosen.ignored)
        found.append(good(subject, f"started by {target.backend.name}; options: {values or 'all by default'}"))
    return found


def _parameter_findings(spec: Kernelspec, *, in_detail: bool) -> list[Finding]:
    from ..parameters import from_schema

    params = from_schema(spec.metadata.get("parameters") or {})
    names = ", ".join(param.variable for param in params.values()) or "none of its own"
    return [good(f"kernelspec {spec.name}", f"open to clients: {names}")] if in_detail else []


# -- this process: user, listener, folder


def user_findings(server: KernelServer, config: Config) -> list[Finding]:
    """Tell whether a server that runs like this process could start kernels for its own user."""
    from ..options import ProvisionerOptions
    from ..policies import check_user, resolve_user

    if server.user_source == "client":
        return [good("user", "taken from KERNEL_USERNAME of the start request: only for trusted callers")]
    try:
        user = resolve_user(server.user_source, {}, os.environ, getpass.getuser())
        check_user(ProvisionerOptions(config=config).operator_policy(), user)
    except GPError as error:
        return [bad("user", str(error), "change user_source, authorized_users or unauthorized_users")]
    return [good("user", f"{user} (user_source {server.user_source}) may start kernels")]


def callback_findings(server: KernelServer) -> list[Finding]:
    """Bind the listener's addresses for a moment, and connect to each that launchers would be told to dial."""
    from ..plugins import plugins

    bound = server._bind_addresses()
    first, last = server.response_port, server.response_port + (server.response_port_retries if server.response_port else 0)
    with contextlib.ExitStack() as stack:
        for port in range(first, last + 1):
            try:
                server.port = _bind(bound, port, stack)
                break
            except OSError as error:
                problem = error
        else:
            text = f"ports {first} to {last} of {', '.join(bound)} cannot be bound: {problem.strerror}"
            return [bad("listener", text, "set GP_RESPONSE_PORT to a free port or to 0, or correct GP_BIND_IP")]
        taken = "" if server.port == first or not first else f" ({first} is taken, by another server as a rule)"
        found = [good("listener", f"binds port {server.port or 'any'} of {', '.join(bound)}{taken}")]
        here = set(server.addresses(local=True))
        for address in dict.fromkeys([*server.addresses(local=True), *server.addresses(local=False)]):
            whose = "launchers on this machine" if address in here else "launchers elsewhere"
            found.append(_reached(address, f"callback {address}", f"told to {whose}"))
    elsewhere = any(not backend.runs_here for backend in plugins().backends.values())
    if elsewhere and all(address.startswith(("127.", "[::1]", "localhost:")) for address in server.addresses(local=False)):
        text = "launchers elsewhere would be told to call the loopback, which is their own machine"
        found.append(bad("callback", text, "set GP_RESPONSE_IP, and GP_BIND_IP if it is set, to an address that they can reach"))
    return found


def _bind(hosts: Sequence[str], port: int, stack: contextlib.ExitStack) -> int:
    with contextlib.ExitStack() as attempt:
        for host in hosts:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = attempt.enter_context(socket.create_server((host, port), family=family))
            port = listener.getsockname()[1]
        stack.push(attempt.pop_all())
    return port


def _reached(address: str, subject: str, told: str) -> Finding:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT).close()
    except OSError as error:
        text = f"{told}, but cannot be connected to from here: {error.strerror or error}"
        return bad(subject, text, "open it in the firewall, or set GP_RESPONSE_IP or GP_PROHIBITED_LOCAL_IPS")
    return good(subject, f"{told}; can be connected to from here")


def folder_findings(folder: Path) -> list[Finding]:
    """Check that nobody else can read the server's key and the records of kernels."""
    from ..store import FileStore

    advice = "make it a folder of this user's that can be written, or set GP_DATA_DIR"
    existing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return [bad("data folder", f"{folder} cannot be written", advice)]
    if existing != folder:
        return [good("data folder", f"{folder} is made at the first start of a kernel")]
    found = []
    keys = [path for path in (folder / "server.pem", folder / "server-next.pem") if path.exists()]
    for path in [folder, *(path for path in (folder / "kernels", folder / "logs") if path.exists()), *keys]:
        info = path.stat()
        if info.st_uid != os.getuid():
            found.append(bad("data folder", f"{path} belongs to user {info.st_uid}", advice))
        elif info.st_mode & 0o077:
            mode = "600" if stat.S_ISREG(info.st_mode) else "700"
            found.append(bad("data folder", f"other users may look into {path}", f"chmod {mode} {path}"))
    found += _record_findings(FileStore(folder / "kernels"))
    return found or [good("data folder", f"{folder} is this user's only")]


def _record_findings(store: FileStore) -> list[Finding]:
    try:
        files = len(list(store.folder.glob("*.json")))
        strange = files - len(store.list())
    except OSError as error:
        return [bad("records", f"{store.folder} cannot be read: {error.strerror}", "correct its permissions")]
    if strange:
        text = f"{strange} of {files} files in {store.folder} are no records of kernels"
        return [bad("records", text, "the warnings above name them: remove them")]
    return []


# -- backends


async def backend_findings(config: Config, specs: Sequence[Kernelspec], known: Mapping[str, Offer]) -> list[Finding]:
    """Ask backends to check themselves, all at once: every one by default, or those of kernelspecs with their options."""
    from ..options import choose
    from ..plugins import plugins

    asked: list[tuple[type[Backend], dict[str, Any]]] = [(cls, {}) for cls in plugins().backends.values()]
    if specs:
        asked = []
        for spec in specs:
            target = known[spec.provisioner or ""]
            with contextlib.suppress(ConfigError):  # found already
                policy = target.cls(config=config).operator_policy()
                asked.append((target.backend, choose(spec.config, target.backend, policy).backend))
    answers = await asyncio.gather(*(_checked(cls, config, options) for cls, options in asked))
    return [finding for answer in answers for finding in answer]


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
