"""What a sandbox speaks on a new connection, from its first bytes (PROTOCOL 5.2). Pure.

What no rule about requests is asked about must not be taken for a request by any server, or a rule that allows one host
would open every name that is served at its address. So the test for HTTP and TLS is wide, and what looks like either
without being what we read is refused: HTTP/2 without TLS, CONNECT, the hello of SSL 2, a record before the hello, and
the PROXY protocol, behind which a request would follow.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, Literal

Kind = Literal["http", "tls", "opaque", "refused"]

MAX_FIRST_LINE_BYTES: Final = 16 * 1024
"""Within which a line that begins like a request must end."""

_METHODS: Final = tuple(
    f"{method} ".encode() for method in ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE")
)
_HANDSHAKE: Final = 0x16
_OTHER_RECORDS: Final = b"\x14\x15\x17"
"""Some TLS servers drop a warning in front of the hello."""
_WHITE_SPACE: Final = b" \t\r\n"
"""What HTTP servers skip in front of a request."""
_LIKE_A_REQUEST: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+(?:\Z|[ \t])")
_VERSION: Final = re.compile(rb"[ \t]HTTP/[0-9]", re.IGNORECASE)
_REFUSED: Final = (b"CONNECT ", b"PRI * ", b"PROXY TCP4 ", b"PROXY TCP6 ", b"PROXY UNKNOWN")
_SSL_2: Final = ((2, b"\x01"), (3, b"\x00\x02\x03"))
"""Behind two bytes of length, the first with its high bit set: 1 for a hello, and the version (RFC 5246 E.2)."""
_PROXY_2: Final = b"\r\n\r\n\x00\r\nQUIT\n"


def classify(data: bytes) -> Kind | None:
    """None while it could still become more than one."""
    if not data:
        return None
    if data[0] == _HANDSHAKE:
        return "tls"
    if data[0] in _OTHER_RECORDS:
        return _refused_if(data, ((1, b"\x03"),))
    if data[0] & 0x80:
        return _refused_if(data, _SSL_2)
    return _text(data)


def _refused_if(data: bytes, expected: Sequence[tuple[int, bytes]]) -> Kind | None:
    """Whether these bytes are at these places."""
    for position, values in expected:
        if position >= len(data):
            return None
        if data[position] not in values:
            return "opaque"
    return "refused"


def _text(data: bytes) -> Kind | None:
    text = data.lstrip(_WHITE_SPACE)
    if text.startswith(_METHODS):
        return "http"
    if data.startswith(_PROXY_2) or text[:16].upper().startswith(_REFUSED):
        return "refused"
    line, end, _ = text.partition(b"\n")
    like_a_request = _LIKE_A_REQUEST.match(text)
    if like_a_request and _VERSION.search(line):
        return "http"
    if text and (end or not like_a_request) and not _PROXY_2.startswith(data):
        return "opaque"
    return None if len(data) < MAX_FIRST_LINE_BYTES else "refused"
