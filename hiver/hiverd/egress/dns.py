"""The resolver that a sandbox sees: every name is 11.0.0.1, and no question goes anywhere (PROTOCOL 5.7). Pure.

So names reach us where they are used, in SNI and Host, and a question cannot carry anything out.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

from msgspec import Struct

from hiverd.contracts.isolation import RESOLVER_ADDRESS

MAX_UDP_BYTES: Final = 1232
"""What we say that we take in a datagram (RFC 6891 6.2.5, with the size that DNS Flag Day 2020 agreed on)."""

_HEADER: Final = struct.Struct("!6H")
_RESPONSE, _RECURSION_AVAILABLE, _RECURSION_DESIRED, _OPCODE = 0x8000, 0x0080, 0x0100, 0x7800
_NOT_IMPLEMENTED: Final = 4
_A, _OPT, _INTERNET = 1, 41, 1
_BAD_VERSION: Final = 1
"""Upper bits of the extended response code BADVERS (RFC 6891 6.1.3)."""
_MAX_NAME_BYTES: Final = 255
_MAX_LABEL_BYTES: Final = 63
_USUAL_TYPES: Final = frozenset((1, 28, 5, 6, 12, 15, 33, 64, 65))
"""A, AAAA, CNAME, SOA, PTR, MX, SRV, SVCB, HTTPS: what programs ask for that only want to connect."""
_LONG_NAME: Final = 128
_LONG_LABEL: Final = 48
_LONG_OPTIONS: Final = 48
"""Bytes of EDNS options: a cookie (RFC 7873) takes 12 to 44."""
_NAME_POINTER: Final = b"\xc0\x0c"


class Question(Struct, frozen=True):
    name: str
    """As asked, in lower case, bytes beyond ASCII escaped. Not checked to be a host name."""
    type: int
    usual: bool = True
    """The message is a standard query in the class IN, with nothing in it but the question and a small OPT record."""

    @property
    def suspicious(self) -> bool:
        """It looks like data on its way out: a type for texts, a name that nobody would type, or more than a name."""
        return (
            not self.usual
            or self.type not in _USUAL_TYPES
            or len(self.name) > _LONG_NAME
            or any(len(label) > _LONG_LABEL for label in self.name.split("."))
        )


def answer(query: bytes) -> tuple[bytes, Question] | None:
    """The answer to a query, and what was asked; None for what is no query, which is not answered."""
    if len(query) < _HEADER.size:
        return None
    identifier, flags, questions, answers, authorities, additions = _HEADER.unpack_from(query)
    if flags & _RESPONSE or questions != 1:
        return None
    parsed = _question(query)
    if parsed is None:
        return None
    name, kind, kind_class, end = parsed
    version, options_bytes, rest = (
        _edns(query, end) if additions == 1 and not (answers or authorities) else (None, 0, end)
    )
    usual = (
        not flags & _OPCODE
        and kind_class == _INTERNET
        and not (answers or authorities)
        and additions == (version is not None)
        and rest == len(query)
        and options_bytes <= _LONG_OPTIONS
    )
    known = kind == _A and kind_class == _INTERNET and not flags & _OPCODE and not version
    answer_flags = _RESPONSE | _RECURSION_AVAILABLE | (flags & (_RECURSION_DESIRED | _OPCODE))
    if flags & _OPCODE:
        answer_flags |= _NOT_IMPLEMENTED
    head = _HEADER.pack(identifier, answer_flags, 1, int(known), 0, int(version is not None))
    record = _NAME_POINTER + struct.pack("!HHIH", _A, _INTERNET, 0, 4) + socket.inet_aton(RESOLVER_ADDRESS)
    return (
        head + query[_HEADER.size : end] + (record if known else b"") + _opt(version),
        Question(name, kind, usual),
    )


def _question(query: bytes) -> tuple[str, int, int, int] | None:
    """Name, type, class, and where the question ends."""
    labels: list[str] = []
    position = _HEADER.size
    while True:
        if position >= len(query):
            return None
        size = query[position]
        position += 1
        if size == 0:
            break
        label = query[position : position + size]
        position += size
        if size > _MAX_LABEL_BYTES or len(label) < size or position + 1 - _HEADER.size > _MAX_NAME_BYTES:
            return None
        labels.append(label.decode("ascii", "backslashreplace").lower())
    if len(query) < position + 4:
        return None
    kind, kind_class = struct.unpack_from("!HH", query, position)
    return ".".join(labels), kind, kind_class, position + 4


def _edns(query: bytes, position: int) -> tuple[int | None, int, int]:
    """The version in an OPT record (RFC 6891 6.1.2), how long its options are, and where it ends; None: it is none."""
    fixed = query[position : position + 11]
    if len(fixed) < 11 or fixed[0] != 0 or int.from_bytes(fixed[1:3]) != _OPT:
        return None, 0, position
    options_bytes = int.from_bytes(fixed[9:11])
    end = position + 11 + options_bytes
    return (fixed[6], options_bytes, end) if end <= len(query) else (None, 0, position)


def _opt(version: int | None) -> bytes:
    """Our own OPT record, for who sent one: version 0, no options."""
    if version is None:
        return b""
    return struct.pack("!BHHBBHH", 0, _OPT, MAX_UDP_BYTES, _BAD_VERSION if version else 0, 0, 0, 0)
