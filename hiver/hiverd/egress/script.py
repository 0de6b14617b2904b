"""What an `override_script` is given, and what of what it leaves is sent (PROTOCOL 5.5). Pure; `script_pool` runs it.

Nothing that a script leaves can change where a request goes, or how it is delimited: the verdict has been made.
"""

from __future__ import annotations

import re
from typing import Final

from msgspec import Struct

from hiverd.egress.script_frames import (
    CPU_SECONDS,
    HINT,
    MAX_BODY_BYTES,
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MEMORY_BYTES,
    Answer,
    Call,
    Failure,
)
from hiverd.http.framing import Headers
from hiverd.http.headers import HOP_BY_HOP, canonical, end_to_end

_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,256}")  # RFC 9110 5.6.2
_VALUE: Final = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")  # RFC 9110 5.5
_HINT: Final = re.compile(HINT)
_UNSEEN: Final = frozenset((b"host", b"content-length", b"expect"))
"""Fields that a script neither sees nor sets: where the request goes, and how it is delimited."""
_FORBIDDEN: Final = HOP_BY_HOP | {b"host", b"expect"}

_REASONS: Final[dict[Failure, str]] = {
    "syntax": "it is no valid Lua",
    "error": "it raised an error",
    "memory": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory",
    "headers": "it left no table of texts in headers, or too much in it",
    "body": f"the body that it left is larger than {MAX_BODY_BYTES >> 20} MiB",
    "time": f"it needs more than {CPU_SECONDS * 1000:g} ms of processor time",
}


class ScriptError(Exception):
    """The script has failed, so its request is denied (PROTOCOL 0.10). The text is for events: it holds no word of the
    script, or of what it was given."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"override_script failed: {reason}")


class Edit(Struct, frozen=True):
    """What a script has made of a request."""

    body: bytes
    dropped: frozenset[bytes]
    """Names of fields, in lower case, that are removed or replaced."""
    added: tuple[tuple[bytes, bytes], ...]

    def headers(self, fields: Headers) -> Headers:
        """The fields to send. Repeated ones that the script has left alone stay as they were."""
        return [*(field for field in fields if field[0] not in self.dropped), *self.added]


def call_of(script: str, *, method: str, host: str, target: str, fields: Headers, body: bytes) -> Call:
    """`fields`, `target` (path and query) and `body` as they would be sent without the script."""
    path, _, query = target.partition("?")
    return Call(
        script=script.encode(),
        body=body,
        headers=[(canonical(name), value) for name, value in _visible(fields).items()],
        method=method.encode("latin-1"),
        host=host.encode("latin-1"),
        path=path.encode("latin-1"),
        query=query.encode("latin-1"),
    )


def judge(call: Call, answer: Answer) -> Edit:
    """Raises `ScriptError` for a failed run, and for an answer that cannot be sent."""
    if answer.failure is not None:
        raise ScriptError(_reason(answer))
    body = call.body if answer.body is None else answer.body
    if len(body) > MAX_BODY_BYTES:
        raise ScriptError(_REASONS["body"])
    given = dict(call.headers)
    left = _left(given, answer.headers, len(body))
    changed = {name: value for name, value in left.items() if given.get(canonical(name)) != value}
    removed = {name.lower() for name in given} - left.keys()
    return Edit(body=body, dropped=frozenset(removed | changed.keys()), added=tuple(changed.items()))


def _visible(fields: Headers) -> dict[bytes, bytes]:
    """The first value of each field that a script may know."""
    return {name: value for name, value in reversed(end_to_end(fields)) if name not in _UNSEEN}


def _left(given: dict[bytes, bytes], headers: list[tuple[bytes, bytes]], body_bytes: int) -> dict[bytes, bytes]:
    """Names in lower case -> values, judged."""
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        raise ScriptError(_REASONS["headers"])
    left: dict[bytes, bytes] = {}
    new: set[bytes] = set()
    for spelled, written in headers:
        name, value = spelled.lower(), written.strip(b" \t")
        if given.get(spelled) == value:
            # `headers["x-key"] = ...` is meant, although `X-Key` from the agent is still in the table.
            left.setdefault(name, value)
            continue
        _judge_field(name, value, body_bytes)
        if name in new:
            raise ScriptError("it left two values for one header field")
        new.add(name)
        if name != b"content-length":
            left[name] = value
    return left


def _judge_field(name: bytes, value: bytes, body_bytes: int) -> None:
    if _NAME.fullmatch(name) is None:
        raise ScriptError("it left a name in headers that is none")
    if _VALUE.fullmatch(value) is None:
        raise ScriptError("it left a header field with control characters")
    if name in _FORBIDDEN or (name == b"content-length" and value != b"%d" % body_bytes):
        raise ScriptError("it set a header field that is not its own: Host, or one of the connection or the framing")


def _reason(answer: Answer) -> str:
    assert answer.failure is not None  # noqa: S101 -- asked only then
    reason = _REASONS[answer.failure]
    if answer.line > 0:
        reason += f", in line {answer.line}"
    return f"{reason}: {answer.hint}" if _HINT.fullmatch(answer.hint) else reason
