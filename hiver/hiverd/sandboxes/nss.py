"""The certificate database that Chromium and other users of NSS read, made without NSS and its `certutil`.

It is a pair of SQLite files. Objects are rows of PKCS #11 attributes, one column for each (`a` and the attribute's
number in hex); numbers are four bytes, big-endian. `cert9.db` holds a certificate and the trust in it. `key4.db`
stays empty, but a reader that must not write wants it there. Without a password there is nothing that trust would
have to be signed with.
"""

from __future__ import annotations

import functools
import hashlib
import sqlite3
from contextlib import closing
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from hiverd.egress.authority import CA_NAME

FILES: Final = ("cert9.db", "key4.db")

_ATTRIBUTES: Final = (
    "a0 a1 a2 a3 a10 a11 a12 a80 a81 a82 a83 a84 a85 a86 a87 a88 a89 a8a a8b a90 a100 a101 a102 a103 a104 a105 a106"
    " a107 a108 a109 a10a a10b a10c a110 a111 a120 a121 a122 a123 a124 a125 a126 a127 a128 a129 a130 a131 a132 a133"
    " a134 a160 a161 a162 a163 a164 a165 a166 a170 a180 a181 a200 a201 a202 a210 a300 a301 a302 a400 a401 a402 a403"
    " a404 a405 a406 a480 a481 a482 a500 a501 a502 a503 a40000211 a40000212 a80000001 ace534351 ace534352 ace534353"
    " ace534354 ace534355 ace534356 ace534357 ace534358 ace534364 ace534365 ace534366 ace534367 ace534368 ace534369"
    " ace534373 ace534374 ace536351 ace536352 ace536353 ace536354 ace536355 ace536356 ace536357 ace536358 ace536359"
    " ace53635a ace53635b ace53635c ace53635d ace53635e ace53635f ace536360 ace5363b4 ace5363b5 ad5a0db00"
)
"""All that NSS 3.87 gives a table; versions before and after it take what they find (sdb.c, `known_attributes`)."""
_INDEXES: Final = {"issuer": "a81", "subject": "a101", "label": "a3", "ckaid": "a102"}

_TRUE, _FALSE, _EMPTY = b"\x01", b"\x00", b"\xa5\x00\x5a"
_CERTIFICATE, _X509, _NSS_TRUST = 1, 0, 0xCE534353
_TRUSTED_DELEGATOR, _MUST_VERIFY, _TRUST_UNKNOWN = 0xCE534352, 0xCE534353, 0xCE53435B


def databases(certificate: x509.Certificate) -> dict[str, bytes]:
    """The content of the files by their names: an authority that servers' certificates may come from, no more."""
    content = certificate.public_bytes(Encoding.DER)
    digest = hashlib.sha1(content, usedforsecurity=False).digest()
    name = {
        "a81": certificate.issuer.public_bytes(),
        "a82": _integer(certificate.serial_number),
        "a1": _TRUE,  # a token's object, not a session's
        "a2": _FALSE,  # not private
        "a170": _TRUE,  # may be changed
    }
    authority = {
        **name,
        "a0": _number(_CERTIFICATE),
        "a3": CA_NAME.encode(),
        "a11": content,
        "a80": _number(_X509),
        "a101": certificate.subject.public_bytes(),
        "a102": digest,
    }
    trust = {
        **name,
        "a0": _number(_NSS_TRUST),
        "a3": _EMPTY,
        "ace536358": _number(_TRUSTED_DELEGATOR),  # for servers
        "ace536359": _number(_TRUST_UNKNOWN),  # for clients
        "ace53635a": _number(_MUST_VERIFY),  # for code
        "ace53635b": _number(_MUST_VERIFY),  # for mail
        "ace536360": _FALSE,
        "ace5363b4": digest,
        "ace5363b5": hashlib.md5(content, usedforsecurity=False).digest(),
    }
    with closing(sqlite3.connect(":memory:")) as database:
        database.deserialize(_empty("nssPublic"))
        for number, row in enumerate((authority, trust), start=1):
            columns = ("id", *row)
            statement = f"INSERT INTO nssPublic ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"  # noqa: S608
            database.execute(statement, (number, *row.values()))
        database.commit()
        return dict(zip(FILES, (database.serialize(), _empty("nssPrivate")), strict=True))


@functools.cache
def _empty(table: str) -> bytes:
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("PRAGMA page_size = 1024")
        database.execute(
            f"CREATE TABLE {table} (id PRIMARY KEY UNIQUE ON CONFLICT ABORT, {', '.join(_ATTRIBUTES.split())})"
        )
        for name, column in _INDEXES.items():
            database.execute(f"CREATE INDEX {name} ON {table} ({column})")
        if table == "nssPrivate":
            database.execute("CREATE TABLE metaData (id PRIMARY KEY UNIQUE ON CONFLICT REPLACE, item1, item2)")
        database.commit()
        return database.serialize()


def _number(value: int) -> bytes:
    return value.to_bytes(4)


def _integer(value: int) -> bytes:
    """In DER (ITU-T X.690, 8.3): NSS finds certificates by this."""
    content = value.to_bytes(value.bit_length() // 8 + 1)
    return bytes((2, len(content))) + content
