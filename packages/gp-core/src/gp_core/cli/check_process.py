"""What ``jupyter gp doctor`` checks of the process that would start kernels: its user, its listener, its folder."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

from traitlets.config import Config

from ..backend import Finding
from ..errors import ConfigError, GPError, StoreError
from ..options import WITHOUT_EFFECT, ProvisionerOptions
from ..plugins import plugins
from ..policies import check_user, resolve_user
from ..server import KernelServer, own_user
from ..store import FileStore
from ..trial import trial_listener
from .findings import bad, good

CONNECT = 2.0  # seconds for a connection to an address of this machine


def user_findings(server: KernelServer, config: Config) -> list[Finding]:
    """Tell whether a server that runs like this process could start kernels for its own user."""
    if server.user_source == "client":
        return [good("user", "taken from KERNEL_USERNAME of the start request: only for trusted callers")]
    try:
        user = resolve_user(server.user_source, {}, os.environ, own_user())
        check_user(ProvisionerOptions(config=config).operator_policy(), user)
    except GPError as error:
        return [bad("user", str(error), "change user_source, authorized_users or unauthorized_users")]
    return [good("user", f"{user} (user_source {server.user_source}) may start kernels")]


def variable_findings() -> list[Finding]:
    """Tell of variables that are kept for the peer's sake and do nothing."""
    found = {f"GP_{name.upper()}": why for name, why in WITHOUT_EFFECT.items()}
    return [good("environment", f"{name} has no effect: {why}") for name, why in found.items() if name in os.environ]


def callback_findings(server: KernelServer) -> list[Finding]:
    """Bind the listener's addresses for a moment, and connect to each that launchers would be told to dial."""
    bound, first = ", ".join(server.bind_addresses()), server.response_port
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(trial_listener(server))
        except ConfigError as error:
            return [bad("listener", str(error), "set GP_RESPONSE_PORT to a free port or to 0, or correct GP_BIND_IP")]
        taken = "" if server.port == first or not first else f" ({first} is taken, by another server as a rule)"
        found = [good("listener", f"binds port {server.port or 'any'} of {bound}{taken}")]
        here = set(server.addresses(local=True))
        for address in dict.fromkeys([*server.addresses(local=True), *server.addresses(local=False)]):
            whose = "launchers on this machine" if address in here else "launchers elsewhere"
            found.append(_reached(address, f"callback {address}", f"told to {whose}"))
    elsewhere = any(not backend.runs_here for backend in plugins().backends.values())
    told = server.addresses(local=False)
    if elsewhere and all(address.startswith(("127.", "[::1]", "localhost:")) for address in told):
        text = "launchers elsewhere would be told to call the loopback, which is their own machine"
        advice = "set GP_RESPONSE_IP, and GP_BIND_IP if it is set, to an address that they can reach"
        found.append(bad("callback", text, advice))
    return found


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
    advice = "make it a folder of this user's that can be written, or set GP_DATA_DIR"
    existing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return [bad("data folder", f"{folder} cannot be written", advice)]
    if existing != folder:
        return [good("data folder", f"{folder} is made at the first start of a kernel")]
    found = []
    keys = [path for name in ("server.pem", "server-next.pem", "seal.key") if (path := folder / name).exists()]
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
    except (OSError, StoreError) as error:
        return [bad("records", f"{store.folder} cannot be read: {error}", "correct its permissions")]
    if strange:
        text = f"{strange} of {files} files in {store.folder} are no records of kernels"
        return [bad("records", text, "the warnings above name them: remove them")]
    return []
