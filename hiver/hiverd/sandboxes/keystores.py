"""Java's trust stores, with one certificate more: bytes in, bytes out, no program of the image runs. Pure.

Two formats are in use for `cacerts`: JKS, which distributions generate, and PKCS #12 without a password, which the JDK
ships since release 18. Both are lists, and the certificate goes to their end.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

ALIAS: Final = "hiver-sandbox-ca"
_JKS_MAGIC: Final = 0xFEEDFEED
_JKS_HEAD: Final = struct.Struct(">III")
_JKS_SALT: Final = "changeit".encode("utf-16-be") + b"Mighty Aphrodite"
"""The password that every `cacerts` has, and the key store's own pinch of salt (sun.security.provider.JavaKeyStore)."""
_DIGEST_BYTES: Final = 20
_TRUSTED_CERTIFICATE: Final = 2

_SEQUENCE, _SET, _OCTETS, _BMP_STRING, _EXPLICIT_0 = 0x30, 0x31, 0x04, 0x1E, 0xA0
_VERSION_3: Final = b"\x02\x01\x03"
_DATA: Final = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x01"
"""The object identifier pkcs7-data."""
# certBag, x509Certificate and friendlyName of RFC 7292, 4.2; trustedKeyUsage of Java, with anyUsage of RFC 5280.
_CERT_BAG: Final = bytes.fromhex("060b2a864886f70d010c0a0103")
_X509_CERTIFICATE: Final = bytes.fromhex("060a2a864886f70d01091601")
_FRIENDLY_NAME: Final = bytes.fromhex("06092a864886f70d010914")
_TRUSTED_KEY_USAGE: Final = bytes.fromhex("060c6086480186f966adca7b0101")
_ANY_USAGE: Final = bytes.fromhex("0604551d2500")


def with_certificate(store: bytes, certificate: x509.Certificate) -> bytes | None:
    """The store with the certificate; None for what is no store that we can write, which must stay as it is."""
    try:
        if len(store) >= _JKS_HEAD.size + _DIGEST_BYTES and _JKS_HEAD.unpack_from(store)[0] == _JKS_MAGIC:
            return _jks(store, certificate)
        return _pkcs12(store, certificate)
    except (ValueError, struct.error):
        return None


def _jks(store: bytes, certificate: x509.Certificate) -> bytes | None:
    body, digest = store[:-_DIGEST_BYTES], store[-_DIGEST_BYTES:]
    magic, version, count = _JKS_HEAD.unpack_from(body)
    if version != 2 or not hmac.compare_digest(_jks_digest(body), digest):
        return None  # a password of somebody's own
    content = certificate.public_bytes(Encoding.DER)
    entry = b"".join(
        (
            struct.pack(">I", _TRUSTED_CERTIFICATE),
            _jks_text(ALIAS),
            struct.pack(">Q", int(certificate.not_valid_before_utc.timestamp() * 1000)),
            _jks_text("X.509"),
            struct.pack(">I", len(content)),
            content,
        )
    )
    body = _JKS_HEAD.pack(magic, version, count + 1) + body[_JKS_HEAD.size :] + entry
    return body + _jks_digest(body)


def _jks_digest(body: bytes) -> bytes:
    digest = hashlib.sha1(_JKS_SALT, usedforsecurity=False)
    digest.update(body)
    return digest.digest()


def _jks_text(text: str) -> bytes:
    return struct.pack(">H", len(text)) + text.encode("ascii")


def _pkcs12(store: bytes, certificate: x509.Certificate) -> bytes:
    """Raises `ValueError` unless it has no password: then there is neither a MAC nor encryption around the list."""
    safes, rest = _authenticated_safes(store)
    if rest:
        raise ValueError("it has a password")
    return _store_of(safes + _certificate_safe(certificate))


def _certificate_safe(certificate: x509.Certificate) -> bytes:
    """A content info of one trusted certificate, as keytool writes it. By hand: `serialize_java_truststore` came with
    cryptography 45, and PyDrive2, which the Drive plug-in needs, holds that below 44.
    """
    value = _tagged(_EXPLICIT_0, _tagged(_OCTETS, certificate.public_bytes(Encoding.DER)))
    bag = _tagged(_SEQUENCE, _X509_CERTIFICATE + value)
    name = _tagged(_SEQUENCE, _FRIENDLY_NAME + _tagged(_SET, _tagged(_BMP_STRING, ALIAS.encode("utf-16-be"))))
    trusted = _tagged(_SEQUENCE, _TRUSTED_KEY_USAGE + _tagged(_SET, _ANY_USAGE))
    safe = _tagged(_SEQUENCE, _CERT_BAG + _tagged(_EXPLICIT_0, bag) + _tagged(_SET, trusted + name))
    octets = _tagged(_OCTETS, _tagged(_SEQUENCE, safe))
    return _tagged(_SEQUENCE, _DATA + _tagged(_EXPLICIT_0, octets))


def _authenticated_safes(store: bytes) -> tuple[bytes, bytes]:
    """(all content infos one after the other, what protects them) of a PFX (RFC 7292, 4)."""
    content, after = _value(store, _SEQUENCE)
    if after or not content.startswith(_VERSION_3):
        raise ValueError("it is no key store")
    info, protection = _value(content[len(_VERSION_3) :], _SEQUENCE)
    if not info.startswith(_DATA):
        raise ValueError("it is signed")
    explicit, _ = _value(info[len(_DATA) :], _EXPLICIT_0)
    octets, _ = _value(explicit, _OCTETS)
    safes, _ = _value(octets, _SEQUENCE)
    return safes, protection


def _store_of(safes: bytes) -> bytes:
    octets = _tagged(_OCTETS, _tagged(_SEQUENCE, safes))
    return _tagged(_SEQUENCE, _VERSION_3 + _tagged(_SEQUENCE, _DATA + _tagged(_EXPLICIT_0, octets)))


def _value(data: bytes, tag: int) -> tuple[bytes, bytes]:
    """(the value of the first element, what follows it), in DER (ITU-T X.690, 8.1). Raises `ValueError`."""
    if len(data) < 2 or data[0] != tag:
        raise ValueError("another element is expected")
    size, start = data[1], 2
    if size & 0x80:
        start += size & 0x7F
        size = int.from_bytes(data[2:start])
    if (start == 2 and data[1] == 0x80) or len(data) < start + size:
        raise ValueError("an element is cut off")
    return data[start : start + size], data[start + size :]


def _tagged(tag: int, value: bytes) -> bytes:
    size = len(value)
    if size < 0x80:
        return bytes((tag, size)) + value
    length = size.to_bytes((size.bit_length() + 7) // 8)
    return bytes((tag, 0x80 | len(length))) + length + value
