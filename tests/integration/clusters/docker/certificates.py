"""An authority for one engine and its clients."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = datetime.timedelta(days=1)


def make_certificates(address: str, *folders: Path) -> None:
    """Write ``ca.pem``, ``cert.pem`` and ``key.pem`` into each folder, for both sides of a connection.

    Args:
        address: IP address of the server.
        folders: They are made.
    """
    root = ec.generate_private_key(ec.SECP256R1())
    authority = _signed("authority", root, root.public_key(), x509.BasicConstraints(ca=True, path_length=0))
    for folder in folders:
        folder.mkdir(exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        use = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        name = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
        made = _signed(folder.name, root, key.public_key(), use, name)
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        for file, data in (("ca", _pem(authority)), ("cert", _pem(made)), ("key", pem)):
            (folder / f"{file}.pem").write_bytes(data)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _signed(
    name: str,
    root: ec.EllipticCurvePrivateKey,
    key: ec.EllipticCurvePublicKey,
    *extensions: x509.ExtensionType,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")]))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), critical=False)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
    return builder.sign(root, hashes.SHA256())
