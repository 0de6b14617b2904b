"""What a sandbox speaks on a new connection, from its first bytes (PROTOCOL 5.2). Pure."""

from __future__ import annotations

from typing import Final, Literal

Kind = Literal["http", "tls", "opaque"]

_METHODS: Final = tuple(
    f"{method} ".encode() for method in ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE")
)
_TLS_STARTS: Final = (b"\x16\x03",)


def classify(data: bytes) -> Kind | None:
    """None while it could still become more than one. CONNECT and HTTP/2 without TLS are opaque."""
    for kind, starts in (("tls", _TLS_STARTS), ("http", _METHODS)):
        for start in starts:
            if data.startswith(start):
                return "tls" if kind == "tls" else "http"
    if any(start.startswith(data) for start in (*_METHODS, *_TLS_STARTS)):
        return None
    return "opaque"
