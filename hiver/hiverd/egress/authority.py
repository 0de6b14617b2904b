"""The certificate authority of one sandbox, and the leaf certificates that it signs (PROTOCOL 5.2, RFC 5280).

Its private key is in a folder of the server's, mode 0600, and never enters the sandbox. All leaves of a sandbox share
one key pair, made anew with each start of the server: a second one would protect nobody, since whoever reads this
process's memory has them all.
"""

from __future__ import annotations

import os
import ssl
from collections import OrderedDict
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_NAME: Final = "Hiver Sandbox CA"
CA_DAYS: Final = 3650
"""A sandbox has no longest life, and its CA is worth nothing outside of it, so it does not end before the sandbox."""
LEAF_SECONDS: Final = 24 * 3600
_RENEW_SECONDS: Final = 3600
_SKEW: Final = timedelta(hours=1)
"""How far behind a sandbox's idea of the time may be."""
MAX_CONTEXTS: Final = 256
_FILE: Final = "ca.pem"
_MAX_COMMON_NAME: Final = 64


class Authority:
    """Signs for one sandbox. Not thread-safe; a new host costs half a millisecond."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, *, made: bool = False) -> None:
        """`made`: nobody can know it yet."""
        self.made: Final = made
        self._key = key
        self._certificate = certificate
        self._key_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        self._leaf_key = ec.generate_private_key(ec.SECP256R1())
        self._leaf_key_pem = _private_pem(self._leaf_key)
        self.certificate_pem: Final = certificate.public_bytes(serialization.Encoding.PEM)
        """What programs in the sandbox trust."""

    @classmethod
    def load_or_make(cls, folder: Path) -> Authority:
        """The CA that is in the folder; a new one if there is none, or none that can be read. Blocking."""
        try:
            content = (folder / _FILE).read_bytes()
            key = serialization.load_pem_private_key(content, None)
            certificate = x509.load_pem_x509_certificate(content)
            if isinstance(key, ec.EllipticCurvePrivateKey):
                return cls(key, certificate)
        except (FileNotFoundError, ValueError):
            pass
        return cls._make(folder)

    @classmethod
    def _make(cls, folder: Path) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _ca_certificate(key)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        unfinished = folder / f"{_FILE}.unfinished"
        unfinished.unlink(missing_ok=True)
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(_private_pem(key) + certificate.public_bytes(serialization.Encoding.PEM))
        unfinished.rename(folder / _FILE)
        return cls(key, certificate, made=True)

    def leaf(self, host: str) -> bytes:
        """A certificate and its key as PEM, for a canonical host name or address."""
        now = datetime.now(UTC)
        names = x509.SubjectAlternativeName([_general_name(host)])
        subject = [x509.NameAttribute(NameOID.COMMON_NAME, host)] if len(host) <= _MAX_COMMON_NAME else []
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(subject))
            .issuer_name(self._certificate.subject)
            .public_key(self._leaf_key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SKEW)
            .not_valid_after(now + timedelta(seconds=LEAF_SECONDS))
            .add_extension(names, critical=not subject)  # RFC 5280 4.2.1.6
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(self._key_id), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM) + self._leaf_key_pem


class ServerContexts:
    """TLS contexts toward the sandbox, one per host, so that no session of one host resumes as another's."""

    def __init__(self, authority: Authority, protocols: list[str]) -> None:
        self._authority = authority
        self._protocols = protocols
        self._contexts: OrderedDict[str, tuple[ssl.SSLContext, datetime]] = OrderedDict()

    def get(self, host: str) -> ssl.SSLContext:
        """The context for a canonical host."""
        now = datetime.now(UTC)
        known = self._contexts.get(host)
        if known is not None and known[1] > now:
            self._contexts.move_to_end(host)
            return known[0]
        context = self._make(host)
        self._contexts[host] = (context, now + timedelta(seconds=LEAF_SECONDS - _RENEW_SECONDS))
        while len(self._contexts) > MAX_CONTEXTS:
            self._contexts.popitem(last=False)
        return context

    def _make(self, host: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(self._protocols)
        # OpenSSL reads the chain from a path only; an anonymous file in memory has one that nobody else can open.
        descriptor = os.memfd_create("leaf", os.MFD_CLOEXEC)
        try:
            os.write(descriptor, self._authority.leaf(host))
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
        return context


def _ca_certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    now = datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, CA_NAME)])
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
