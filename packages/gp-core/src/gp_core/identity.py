"""The server's key and certificate: made once, kept 0600, rotated without losing a launcher."""

from __future__ import annotations

import datetime
import hashlib
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from .errors import StoreError
from .store import private_folder, write_private

ROTATE_AFTER = datetime.timedelta(days=365)
LIFETIME = datetime.timedelta(days=3650)  # launchers check the pin, not the dates


@dataclass(frozen=True)
class Identity:
    """What launchers recognise this installation by.

    Args:
        pem: File with private key and certificate in use.
        sealing: File with the key of `seal`, which never changes.
        pins: SHA-256 of the whole certificate in use and of the next one, in hex.
    """

    pem: Path
    sealing: Path
    pins: tuple[str, str]

    @classmethod
    def load(cls, folder: Path) -> Identity:
        """Read the identity from a folder, or make it; blocks.

        There are always two certificates, the current one and its successor, and launchers get the pins of both: when
        the current one is a year old the successor takes its place, and every launcher of the last year knows it.

        Raises:
            StoreError: The folder cannot be used.
        """
        try:
            private_folder(folder)
            current, following, sealing = (folder / name for name in ("server.pem", "server-next.pem", "seal.key"))
            _ensure(sealing, Fernet.generate_key)
            for path in (current, following):
                _ensure(path)
            if _age(current) > ROTATE_AFTER:
                os.replace(following, current)
                _ensure(following)
            return cls(current, sealing, (_pin(current), _pin(following)))
        except (OSError, ValueError) as error:
            raise StoreError(f"the server's key in {folder} cannot be used: {error}") from None

    def context(self) -> ssl.SSLContext:
        """Return the TLS context of the rendezvous: TLS 1.3 only."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self.pem)
        context.num_tickets = 0  # launchers never resume a TLS session, and tickets cost memory for each
        return context

    def seal(self, secret: bytes) -> str:
        """Encrypt something so that only a server with the same key can read it."""
        return self._box().encrypt(secret).decode()

    def unseal(self, sealed: str) -> bytes:
        """Inverse of `seal`.

        Raises:
            StoreError: Sealed with another key, or changed.
        """
        try:
            return self._box().decrypt(sealed.encode())
        except InvalidToken:
            raise StoreError("the kernel's secrets were sealed with another server key") from None

    def _box(self) -> Fernet:
        return Fernet(self.sealing.read_bytes())


def installation(folder: Path) -> str:
    """Return the name of a data folder's installation: 12 hexadecimal digits, or none before its first start."""
    try:
        return hashlib.sha256(b"installation" + (folder / "seal.key").read_bytes()).hexdigest()[:12]
    except OSError:
        return ""


def _certificate(pem: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem.read_bytes())


def _pin(pem: Path) -> str:
    return hashlib.sha256(_certificate(pem).public_bytes(serialization.Encoding.DER)).hexdigest()


def _age(pem: Path) -> datetime.timedelta:
    return datetime.datetime.now(datetime.timezone.utc) - _certificate(pem).not_valid_before_utc


def _key_and_certificate() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gateway provisioners")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + LIFETIME)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _ensure(path: Path, make: Callable[[], bytes] = _key_and_certificate) -> None:
    if path.exists():
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
        return
    write_private(path, make(), replace=False)
