"""Take the launch secrets: token, connection template and environment of the kernel."""

from __future__ import annotations

import os

from .quickjson import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VARIABLE = "GP_LAUNCH_SECRETS"


class SecretsError(Exception):
    """There are no usable secrets; the text never holds any of them."""


class Secrets:
    """What the server hands over.

    Args:
        document: ``{"token": str, "connection": {...}, "env": {...}}``.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self.token: str = document["token"]
        self.connection: dict[str, Any] | None = document.get("connection")
        self.env: dict[str, str] = document.get("env") or {}


def read_secrets(path: str) -> Secrets:
    """Read the secrets and remove them from where they were, as far as we can.

    Args:
        path: File, `-` for standard input, empty for the environment variable.

    Raises:
        SecretsError: They are missing or malformed.
    """
    text = os.environ.pop(VARIABLE, "")
    if path:
        source = "standard input" if path == "-" else path
        text = _read_file(path)
    else:
        source = VARIABLE
        if not text:
            raise SecretsError(f"no launch secrets: neither {VARIABLE} nor --secrets-file is given")
    try:
        document = loads(text)
    except ValueError:
        # The parser's own text quotes what it read.
        raise SecretsError(f"the launch secrets in {source} are not JSON") from None
    if not isinstance(document, dict) or not isinstance(document.get("token"), str) or not document["token"]:
        raise SecretsError(f"the launch secrets in {source} have no token")
    if not isinstance(document.get("connection") or {}, dict) or not environment_is_valid(document.get("env") or {}):
        raise SecretsError(f"the launch secrets in {source} are malformed")
    return Secrets(document)


def environment_is_valid(env: object) -> bool:
    """Say whether something can be an environment: text to text, no zero bytes, no `=` in a name."""
    return isinstance(env, dict) and all(
        isinstance(name, str) and isinstance(value, str) and name and "=" not in name and "\0" not in name + value
        for name, value in env.items()
    )


def _read_file(path: str) -> str:
    try:
        descriptor = 0 if path == "-" else os.open(path, os.O_RDONLY)
        parts = []
        try:
            while True:
                part = os.read(descriptor, 65536)
                if not part:
                    break
                parts.append(part)
        finally:
            if descriptor:
                os.close(descriptor)
        if path != "-":
            _delete(path)
        return b"".join(parts).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SecretsError(f"cannot read the launch secrets from {path}: {reason}") from None


def _delete(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass  # a mounted Secret, for example: its owner takes care of it
