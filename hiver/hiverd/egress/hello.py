"""Reading a TLS ClientHello before TLS starts (RFC 8446 4.1.2, RFC 6066 3): bytes in, the server's name out. Pure.

What is peeked here is afterwards handed to OpenSSL unread, so a hello that two readers could take differently is
malformed for us: names that occur twice, extensions that do, bytes behind the end.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from hiverd.egress.names import HostError, canonical_host, parse_address

MAX_HELLO_BYTES: Final = 16 * 1024
"""Of records up to the end of the hello. The largest in use, with post-quantum shares, have some 2 KiB."""

_HANDSHAKE_RECORD: Final = 22
_CLIENT_HELLO: Final = 1
_RECORD_HEADER_BYTES: Final = 5
_MAX_RECORD_BYTES: Final = 16384
_SERVER_NAME: Final = 0
_ALPN: Final = 16
_ENCRYPTED_CLIENT_HELLO: Final = 0xFE0D

ACCESS_DENIED: Final = 49
INTERNAL_ERROR: Final = 80
DECODE_ERROR: Final = 50


class ClientHello(Struct, frozen=True):
    server_name: str | None
    """Canonical; None without SNI."""
    alpn: tuple[bytes, ...]
    encrypted: bool
    """It has an encrypted inner hello (or pretends to), so the name is the outer one."""


class HelloError(ValueError):
    """It begins like TLS and is no ClientHello that we accept. The text is safe to show."""


def read_hello(data: bytes) -> ClientHello | None:
    """The hello at the start of a connection; None while more bytes are needed. Raises `HelloError`."""
    message = _handshake_message(data)
    if message is None:
        if len(data) > MAX_HELLO_BYTES:
            raise HelloError("the ClientHello is too large")
        return None
    return _parse(message)


def alert(description: int) -> bytes:
    """A fatal alert, to be sent instead of a ServerHello (RFC 8446 6.2)."""
    return bytes((21, 3, 3, 0, 2, 2, description))


def _handshake_message(data: bytes) -> bytes | None:
    """The body of the first handshake message, which may span records."""
    gathered = bytearray()
    position = 0
    while True:
        wanted = 4 + int.from_bytes(gathered[1:4]) if len(gathered) >= 4 else None
        if gathered and gathered[0] != _CLIENT_HELLO:
            raise HelloError("the first message is no ClientHello")
        if wanted is not None and wanted > MAX_HELLO_BYTES:
            raise HelloError("the ClientHello is too large")
        if wanted is not None and len(gathered) >= wanted:
            if len(gathered) > wanted:
                raise HelloError("bytes follow the ClientHello")
            return bytes(gathered[4:])
        header = data[position : position + _RECORD_HEADER_BYTES]
        _check_header(header)
        if len(header) < _RECORD_HEADER_BYTES:
            return None
        size = int.from_bytes(header[3:])
        if not 0 < size <= _MAX_RECORD_BYTES:
            raise HelloError("a record has a wrong length")
        record = data[position + _RECORD_HEADER_BYTES :][:size]
        gathered += record
        if len(record) < size:
            if len(gathered) and gathered[0] != _CLIENT_HELLO:
                raise HelloError("the first message is no ClientHello")
            return None
        position += _RECORD_HEADER_BYTES + size


def _check_header(header: bytes) -> None:
    if header and header[0] != _HANDSHAKE_RECORD:
        raise HelloError("a record of another kind interrupts the ClientHello")
    if len(header) > 1 and header[1] != 3:
        raise HelloError("the record's version is not that of TLS")


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._position

    def take(self, size: int) -> bytes:
        if self.left < size:
            raise HelloError("the ClientHello is cut short")
        self._position += size
        return self._data[self._position - size : self._position]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def vector(self, size: int) -> _Reader:
        """What follows a length of `size` bytes."""
        return _Reader(self.take(self.number(size)))

    def end(self) -> None:
        if self.left:
            raise HelloError("the ClientHello has bytes left over")


def _parse(message: bytes) -> ClientHello:
    reader = _Reader(message)
    reader.take(2 + 32)
    reader.vector(1)
    reader.vector(2)
    reader.vector(1)
    extensions: dict[int, _Reader] = {}
    if reader.left:
        block = reader.vector(2)
        while block.left:
            kind = block.number(2)
            if kind in extensions:
                raise HelloError("an extension occurs twice")
            extensions[kind] = block.vector(2)
    reader.end()
    return ClientHello(
        server_name=_server_name(extensions[_SERVER_NAME]) if _SERVER_NAME in extensions else None,
        alpn=_protocols(extensions[_ALPN]) if _ALPN in extensions else (),
        encrypted=_ENCRYPTED_CLIENT_HELLO in extensions,
    )


def _server_name(extension: _Reader) -> str:
    names = extension.vector(2)
    extension.end()
    kind, name = names.number(1), names.vector(2)
    names.end()
    if kind != 0:
        raise HelloError("the server's name is of an unknown kind")
    try:
        text = name.take(name.left).decode("ascii")
        host = canonical_host(text)
    except (UnicodeDecodeError, HostError) as error:
        raise HelloError("the server's name is no host name") from error
    if parse_address(host) is not None:
        raise HelloError("the server's name is an address")  # RFC 6066 3 forbids it
    return host


def _protocols(extension: _Reader) -> tuple[bytes, ...]:
    listed = extension.vector(2)
    extension.end()
    found: list[bytes] = []
    while listed.left:
        item = listed.vector(1)
        found.append(item.take(item.left))
    return tuple(found)
