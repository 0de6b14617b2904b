"""TLS ClientHellos, good and bad, byte by byte (RFC 8446 4.1.2)."""

from __future__ import annotations

import os


def vector(data: bytes, size: int) -> bytes:
    """With its length in `size` bytes in front."""
    return len(data).to_bytes(size) + data


def extension(kind: int, content: bytes) -> bytes:
    return kind.to_bytes(2) + vector(content, 2)


def server_name(*names: bytes, kind: int = 0) -> bytes:
    """RFC 6066 3."""
    return extension(0, vector(b"".join(bytes((kind,)) + vector(name, 2) for name in names), 2))


def alpn(*protocols: bytes) -> bytes:
    """RFC 7301 3.1."""
    return extension(16, vector(b"".join(vector(protocol, 1) for protocol in protocols), 2))


ENCRYPTED_HELLO = extension(0xFE0D, b"\0\0\1\0\1\7" + vector(os.urandom(32), 2) + vector(os.urandom(128), 2))
COMMON = (
    extension(10, vector(b"\0\x1d\0\x17", 2))
    + extension(11, vector(b"\0", 1))
    + extension(13, vector(b"\4\3\5\3\6\3\x08\4\x08\5\x08\6", 2))
)
"""Groups, point formats and signature algorithms: enough for TLS 1.2."""


def message(*extensions: bytes, tail: bytes = b"") -> bytes:
    """A handshake message. `tail` follows the extensions, inside of it."""
    body = b"\3\3" + os.urandom(32) + vector(b"", 1) + vector(b"\xc0\x2b\xc0\x2f", 2) + vector(b"\0", 1)
    body += vector(b"".join((COMMON, *extensions)), 2) + tail
    return b"\1" + vector(body, 3)


def records(content: bytes, size: int = 16384, version: bytes = b"\3\1") -> bytes:
    """Cut into records of this many bytes."""
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    return b"".join(b"\x16" + version + vector(piece, 2) for piece in pieces)


def hello(*extensions: bytes) -> bytes:
    return records(message(*extensions))
