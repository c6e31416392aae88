"""What ``jupyter gp doctor`` checks of kernelspecs; starts nothing."""

from __future__ import annotations

from collections.abc import Mapping

from traitlets.config import Config

from ..backend import Finding
from ..command import placeholders
from ..errors import ConfigError
from ..install import Kernelspec, Offer, provisioner_entries
from ..options import choose
from ..parameters import from_schema
from ..server import KernelServer
from .findings import bad, good

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
    here = target.backend.runs_command_here(spec.argv, spec.config.get("submit"))
    if "resource_dir" in placeholders(spec.argv) and not here:
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
    params = from_schema(spec.metadata.get("parameters") or {})
    names = ", ".join(param.variable for param in params.values()) or "none of its own"
    return [good(f"kernelspec {spec.name}", f"open to clients: {names}")] if in_detail else []
