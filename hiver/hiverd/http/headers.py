"""What a proxy does to header fields (RFC 9110 7.6, PROTOCOL 3.13). Pure functions over ASGI header lists."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from hiverd.http.framing import Headers, connection_tokens

HOP_BY_HOP: Final = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",  # where trailers are not relayed: ASGI servers cannot send them
        b"transfer-encoding",
        b"upgrade",
    )
)
_WITH_TRAILERS: Final = HOP_BY_HOP - {b"trailer"}
_REBUILT: Final = HOP_BY_HOP | {b"host", b"content-length", b"x-forwarded-for"}
_NO_TRAILERS: Final = HOP_BY_HOP | frozenset(
    (
        b"authorization",
        b"content-encoding",
        b"content-length",
        b"content-range",
        b"content-type",
        b"cookie",
        b"expect",
        b"host",
        b"range",
        b"set-cookie",
    )
)
"""What a message is read by, so it cannot come behind it: framing, routing, access, format (RFC 9110 6.5.1)."""
_MAX_CACHED_NAME_BYTES: Final = 64


def end_to_end(headers: Headers, *, trailers: bool = False) -> Headers:
    """The fields that are meant for the other end, in order, repeated ones included.

    `trailers`: those are relayed as well, and so is what announces them.
    """
    dropped = always = _WITH_TRAILERS if trailers else HOP_BY_HOP
    for name, _ in headers:
        if name == b"connection":
            dropped = always | connection_tokens(headers)
            break
    return [field for field in headers if field[0] not in dropped]


def takes_trailers(headers: Headers) -> bool:
    """Whether `TE: trailers` asks for them (RFC 9110 10.1.4)."""
    return any(
        name == b"te" and b"trailers" in [member.strip().lower() for member in value.split(b",")]
        for name, value in headers
    )


def relayed_trailers(fields: Headers, reserved: frozenset[bytes] = frozenset()) -> Headers:
    """Those of the fields behind a body that may be there, without `reserved` names."""
    return [field for field in fields if field[0] not in _NO_TRAILERS and field[0] not in reserved]


def forwarded(headers: Headers, client_host: str | None, scheme: str) -> Headers:
    """The end-to-end fields of a request to send on, without Host and framing, with X-Forwarded-* in place.

    `X-Forwarded-For` gets the client's address appended. Host and Proto are kept if a proxy before us set them.
    """
    first = dict(reversed(headers))
    dropped = _REBUILT | connection_tokens(headers) if b"connection" in first else _REBUILT
    kept = [field for field in headers if field[0] not in dropped]
    route = [value for name, value in headers if name == b"x-forwarded-for"]
    if client_host:
        route.append(client_host.encode("ascii", "replace"))
    if route:
        kept.append((b"x-forwarded-for", b", ".join(route)))
    if b"x-forwarded-host" not in first and b"host" in first:
        kept.append((b"x-forwarded-host", first[b"host"]))
    if b"x-forwarded-proto" not in first:
        kept.append((b"x-forwarded-proto", scheme.encode("ascii", "replace")))
    return kept


def field_block(headers: Headers) -> bytes:
    """Field lines ready to send, names in their usual spelling. Raises `ValueError` on a line break or NUL in one."""
    block = b"".join([b"%b: %b\r\n" % (canonical(name), value) for name, value in headers])
    count = len(headers)
    if block.count(b"\n") != count or block.count(b"\r") != count or b"\0" in block:
        raise ValueError("a header field holds a line break or NUL")
    return block


def joined(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Headers as events carry them (PROTOCOL 5.9): canonical name -> all values joined with `, `."""
    result: dict[str, str] = {}
    for name, value in headers:
        key = canonical_text(name)
        text = value.decode("utf-8", "replace")
        known = result.get(key)
        result[key] = text if known is None else f"{known}, {text}"
    return result


def canonical(name: bytes) -> bytes:
    """`content-type` -> `Content-Type`."""
    return _canonical(name) if len(name) <= _MAX_CACHED_NAME_BYTES else name.title()


def canonical_text(name: bytes) -> str:
    return _canonical_text(name) if len(name) <= _MAX_CACHED_NAME_BYTES else name.title().decode("latin-1")


@lru_cache(maxsize=1024)
def _canonical(name: bytes) -> bytes:
    return b"-".join([part.capitalize() for part in name.split(b"-")])


@lru_cache(maxsize=1024)
def _canonical_text(name: bytes) -> str:
    return _canonical(name).decode("latin-1")
