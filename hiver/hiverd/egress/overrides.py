"""What a rule changes in a request that it allows (PROTOCOL 5.5). Pure.

The order is query, headers, prefix_path, body; `host` concerns the dialling only. What is put in may be secret, so
nothing from here goes into an event as it is.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any, Final
from urllib.parse import parse_qsl, quote, quote_plus, urlencode

import msgspec

from hiverd.egress.names import split_authority
from hiverd.http.framing import Headers
from hiverd.http.headers import HOP_BY_HOP
from hiverd.http.requests import RequestError
from hiverd.wire.model import EgressOverride
from hiverd.wire.redaction import REDACTED

MAX_MERGED_BODY_BYTES: Final = 8 * 1024 * 1024
"""Of the agent's body, with or without its content coding, where it has to be held as a whole."""
_BODY_FIELDS: Final = frozenset((b"content-length", b"content-encoding", b"transfer-encoding"))
_TARGET_CHARACTERS: Final = "/%!$&'()*+,;=:@~"

_NEVER_SET: Final = HOP_BY_HOP | {b"content-length", b"expect"}
"""What is ours to say, whatever a rule wants."""


def dial_target(override: EgressOverride | None, host: str, port: int) -> tuple[str, int]:
    """Host and port to connect to. Raises `HostError` for a host that is none."""
    if override is None or not override.host:
        return host, port
    other, other_port = split_authority(override.host)
    return other, port if other_port is None else other_port


def target(override: EgressOverride | None, path: str, query: str | None) -> str:
    """The request target to send, in origin form."""
    if override is not None:
        if override.query:
            query = _with_query(query or "", override.query)
        if override.prefix_path:
            # Without what would end the path, or the request line.
            path = quote("/" + override.prefix_path.strip("/"), safe=_TARGET_CHARACTERS).rstrip("/") + path
    return path if query is None else f"{path}?{query}"


def headers(override: EgressOverride | None, fields: Headers) -> Headers:
    """The fields to send: those of the override in place of all others of their names. Fields that delimit the message
    or belong to one connection are nobody's to set."""
    if override is None or not override.headers:
        return fields
    names = header_names(override)
    added = {name.lower().encode(): value.encode() for name, value in override.headers.items()}
    kept = [field for field in fields if field[0] not in names]
    return [*kept, *((name, value) for name, value in added.items() if name in names)]


def header_names(override: EgressOverride | None) -> frozenset[bytes]:
    """The fields that the override sets, in lower case."""
    if override is None or not override.headers:
        return frozenset()
    return frozenset(name.lower().encode() for name in override.headers) - _NEVER_SET


def shown_headers(override: EgressOverride | None, fields: Headers) -> Headers:
    """As `headers`, for events: what the override sets is not told."""
    if override is None or not override.headers:
        return fields
    hidden = dict.fromkeys(override.headers, REDACTED)
    return headers(EgressOverride(headers=hidden), fields)


def replaces_body(override: EgressOverride | None) -> bool:
    """True if the agent's body is not sent as it is; it may have to be read as a whole before."""
    return override is not None and isinstance(override.body, str | dict)


def body(override: EgressOverride, agent_body: bytes) -> bytes:
    """The body to send, given the agent's own without its content coding."""
    wanted = override.body
    if isinstance(wanted, str):
        return wanted.encode()
    assert wanted is not None  # noqa: S101 -- asked only if `replaces_body`
    if override.body_strategy == "replace":
        return msgspec.json.encode(wanted)
    return msgspec.json.encode({**_object(agent_body), **wanted})


def decoded(content: bytes, fields: Headers) -> bytes:
    """The agent's body without its content coding; with one that is not known here it is no JSON, and counts as none.
    Raises `RequestError` 413 if it is too large then."""
    codings = [value.strip().lower() for name, value in fields if name == b"content-encoding"]
    if codings in ([], [b""], [b"identity"]):
        return content
    if codings not in ([b"gzip"], [b"x-gzip"], [b"deflate"]):
        return b""
    inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    try:
        plain = inflater.decompress(content, MAX_MERGED_BODY_BYTES + 1)
    except zlib.error:
        return b""
    if len(plain) > MAX_MERGED_BODY_BYTES:
        raise RequestError(413, "the request's body is too large to be changed")
    return plain


def without_body_fields(fields: Headers) -> Headers:
    """Fields that do not describe the body that was replaced."""
    return [field for field in fields if field[0] not in _BODY_FIELDS]


def secrets_of(override: EgressOverride | None) -> tuple[str, ...]:
    """Texts that an upstream may send back and events must not show, the longest first."""
    if override is None:
        return ()
    query = (override.query or {}).values()
    return secrets_in([*(override.headers or {}).values(), *query, *map(quote_plus, query), *_texts(override.body)])


def secrets_in(values: Iterable[str]) -> tuple[str, ...]:
    """The values and their words, the longest first."""
    found = set(values)
    for value in list(found):
        found.update(value.split())
    return tuple(sorted((text for text in found if len(text) >= _SECRET_CHARACTERS), key=len, reverse=True))


_SECRET_CHARACTERS: Final = 8
"""Shorter values are words such as `application/json`'s parts, of which a text without them would tell more."""


def _texts(value: object) -> Iterator[str]:
    """Every string within a body, names of members aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _with_query(query: str, wanted: dict[str, str]) -> str:
    # What is no UTF-8 stays what it is.
    kept: dict[str, list[str]] = {}
    for name, value in parse_qsl(query, keep_blank_values=True, errors="surrogateescape"):
        kept.setdefault(name, []).append(value)
    kept.update({name: [value] for name, value in wanted.items()})
    return urlencode(sorted(kept.items()), doseq=True, errors="surrogateescape")


def _object(content: bytes) -> dict[str, Any]:
    """The members as they are written, so that numbers of any size and precision stay the same."""
    try:
        return dict(msgspec.json.decode(content, type=dict[str, msgspec.Raw]))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
