"""What passes between the server and a worker that runs an `override_script`: one frame there, one frame back.

A frame is its length in four bytes, then msgpack. This module is imported by workers, so it imports next to nothing.
"""

from __future__ import annotations

from typing import Final, Literal

from msgspec import Struct, msgpack

MAX_BODY_BYTES: Final = 8 * 1024 * 1024
"""Of the body that a script gets, and of the one that it leaves (PROTOCOL 5.5)."""
CPU_SECONDS: Final = 0.2
"""Of processor time, so that a busy machine does not make a script fail (PROTOCOL 5.5)."""
MEMORY_BYTES: Final = 64 * 1024 * 1024
"""Of one run's Lua values."""
MAX_HEADERS: Final = 1_000
MAX_HEADER_BYTES: Final = 64 * 1024
"""Of all names and values that a script leaves."""
MAX_FRAME_BYTES: Final = MAX_BODY_BYTES + MAX_HEADER_BYTES + 64 * 1024
"""Of an answer."""
SIZE_BYTES: Final = 4

READY: Final = b"R"
"""A worker says this on its second descriptor, once for each call that it can take."""

Failure = Literal["syntax", "error", "memory", "headers", "body", "time"]

_TYPE: Final = "(?:nil|boolean|number|string|table|function)"
HINT: Final = (
    f"attempt to (?:index|call|concatenate|perform arithmetic on|get length of) a {_TYPE} value"
    f"|attempt to compare (?:two {_TYPE} values|{_TYPE} with {_TYPE})"
    "|bad argument #[0-9]{1,3}|malformed (?:pattern|number)|stack overflow"
)
"""Regular expression of all that is told of an error's text, which may hold words of the script or what it read."""


class Call(Struct, frozen=True, array_like=True):
    """A script and its globals."""

    script: bytes
    body: bytes
    headers: list[tuple[bytes, bytes]]
    """Canonical name -> first value."""
    method: bytes
    host: bytes
    path: bytes
    query: bytes


class Answer(Struct, frozen=True, array_like=True):
    """What a script left, or why there is nothing. Not to be trusted: the server judges it."""

    failure: Failure | None = None
    line: int = 0
    """Of the script, where the failure has one; otherwise 0."""
    hint: str = ""
    """What the interpreter says about it, as far as `HINT` allows."""
    body: bytes | None = None
    """None: the script left no string there."""
    headers: list[tuple[bytes, bytes]] = []


_call_decoder = msgpack.Decoder(Call)
_answer_decoder = msgpack.Decoder(Answer)


def frame(message: Call | Answer) -> bytes:
    """Ready to send."""
    content = msgpack.encode(message)
    return len(content).to_bytes(SIZE_BYTES) + content


def decode_call(content: bytes | bytearray) -> Call:
    """Raises `msgspec.MsgspecError`."""
    return _call_decoder.decode(content)


def decode_answer(content: bytes | bytearray) -> Answer:
    """Raises `msgspec.MsgspecError`."""
    return _answer_decoder.decode(content)
