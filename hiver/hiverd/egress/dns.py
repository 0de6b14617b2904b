"""The resolver that a sandbox sees: every name is 11.0.0.1, and no question goes anywhere (PROTOCOL 5.7). Pure.

So names reach us where they are used, in SNI and Host, and a question cannot carry anything out.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

from msgspec import Struct

from hiverd.contracts.isolation import RESOLVER_ADDRESS

_HEADER: Final = struct.Struct("!6H")
_RESPONSE, _RECURSION_AVAILABLE, _RECURSION_DESIRED, _OPCODE = 0x8000, 0x0080, 0x0100, 0x7800
_NOT_IMPLEMENTED: Final = 4
_A, _INTERNET = 1, 1
_MAX_NAME_BYTES: Final = 255
_USUAL_TYPES: Final = frozenset((1, 28, 5, 6, 12, 15, 33, 64, 65))
"""A, AAAA, CNAME, SOA, PTR, MX, SRV, SVCB, HTTPS: what programs ask for that only want to connect."""
_LONG_NAME: Final = 128
_LONG_LABEL: Final = 48
_NAME_POINTER: Final = b"\xc0\x0c"


class Question(Struct, frozen=True):
    name: str
    type: int

    @property
    def suspicious(self) -> bool:
        """It looks like data on its way out: a type for texts, or a name that nobody would type."""
        return (
            self.type not in _USUAL_TYPES
            or len(self.name) > _LONG_NAME
            or any(len(label) > _LONG_LABEL for label in self.name.split("."))
        )


def answer(query: bytes) -> tuple[bytes, Question] | None:
    """The answer to a query, and what was asked; None for what is no query, which is not answered."""
    if len(query) < _HEADER.size:
        return None
    identifier, flags, questions, _, _, _ = _HEADER.unpack_from(query)
    if flags & _RESPONSE or questions != 1:
        return None
    parsed = _question(query)
    if parsed is None:
        return None
    question, end = parsed
    kept = query[_HEADER.size : end]
    known = question.type == _A and not flags & _OPCODE
    answer_flags = _RESPONSE | _RECURSION_AVAILABLE | (flags & (_RECURSION_DESIRED | _OPCODE))
    if flags & _OPCODE:
        answer_flags |= _NOT_IMPLEMENTED
    head = _HEADER.pack(identifier, answer_flags, 1, int(known), 0, 0)
    record = _NAME_POINTER + struct.pack("!HHIH", _A, _INTERNET, 0, 4) + socket.inet_aton(RESOLVER_ADDRESS)
    return head + kept + (record if known else b""), question


def _question(query: bytes) -> tuple[Question, int] | None:
    labels: list[str] = []
    position = _HEADER.size
    while True:
        if position >= len(query) or position - _HEADER.size > _MAX_NAME_BYTES:
            return None
        size = query[position]
        position += 1
        if size == 0:
            break
        label = query[position : position + size]
        if size > 63 or len(label) < size:
            return None
        labels.append(label.decode("ascii", "backslashreplace").lower())
        position += size
    if len(query) < position + 4:
        return None
    return Question(".".join(labels), int.from_bytes(query[position : position + 2])), position + 4
