"""A strict reader of tar streams: POSIX ustar and pax, and of GNU's long names and sparse format 1.0. No file I/O.

Everything in the stream is hostile. Whatever is not understood is an error, never a guess; nothing is held in memory
but one header and its records, whose size is bounded.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import Final, Protocol

from msgspec import Struct

from hiverd.snapshots import members
from hiverd.snapshots.attributes import is_portable
from hiverd.snapshots.members import BLOCK, DELETED, OPAQUE, Attributes

MAX_RECORDS_BYTES: Final = 1 << 20
"""Of one pax header: extended attributes have 64 KiB at most (xattr(7))."""
_MAX_SPARSE_MAP_BYTES: Final = 4 << 20
_PIECE_BYTES: Final = 1 << 20
_CONTIGUOUS: Final = b"7"
_KINDS: Final = {b"\0": members.REGULAR, _CONTIGUOUS: members.REGULAR}
_LONG_NAME: Final = b"L"
_LONG_LINK: Final = b"K"
_WITHOUT_DATA: Final = frozenset({members.HARD_LINK, members.SYMLINK, members.DIRECTORY, members.FIFO, b"3", b"4"})


class DamagedArchiveError(Exception):
    """The stream is no archive, or has been cut off."""


class Source(Protocol):
    def read(self, size: int, /) -> bytes:
        """Up to so many bytes; none at the end."""


class Member(Struct, frozen=True):
    name: bytes
    """As it stands in the archive: hostile."""
    kind: bytes
    attributes: Attributes
    size: int
    """Of the file, holes included."""
    link: bytes
    deleted: tuple[bytes, ...] = ()
    opaque: bool = False
    extents: tuple[tuple[int, int], ...] | None = None
    """(start, length) of what is no hole; None: all of it."""


class TarReader:
    """Iterates over members; between two of them, `content` gives the data of the one before."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._buffer = b""
        self._at = 0
        self._left = 0
        """Bytes of the current member's data."""
        self._padding = 0

    def __iter__(self) -> Iterator[Member]:
        common: dict[bytes, bytes] = {}
        own: dict[bytes, bytes] = {}
        while True:
            self._skip()
            block = self._exactly(BLOCK)
            if not block.strip(b"\0"):
                return  # the end; what may follow means nothing
            _check(block)
            kind = _KINDS.get(block[156:157], block[156:157])
            size = _number(block[124:136])
            if kind in {b"x", b"g"}:
                records = _records(self._meta(size))
                (common if kind == b"g" else own).update(records)
            elif kind in {_LONG_NAME, _LONG_LINK}:
                key = b"path" if kind == _LONG_NAME else b"linkpath"
                own.setdefault(key, self._meta(size).partition(b"\0")[0])
            else:
                yield self._member(block, kind, common | own)
                own = {}

    def content(self) -> Iterator[bytes]:
        """The data of the member that was yielded last, in pieces."""
        while self._left:
            piece = self._some(min(self._left, _PIECE_BYTES))
            self._left -= len(piece)
            yield piece

    def _member(self, block: bytes, kind: bytes, records: dict[bytes, bytes]) -> Member:
        size = _record_number(records, b"size", _number(block[124:136]))
        if kind in _WITHOUT_DATA:
            size = 0
        self._left, self._padding = size, -size % BLOCK
        extents = None
        name = records.get(b"path") or _name(block)
        if b"GNU.sparse.major" in records:
            if (records[b"GNU.sparse.major"], records.get(b"GNU.sparse.minor")) != (b"1", b"0"):
                raise DamagedArchiveError("a form of sparse files that is not known")
            size = _record_number(records, b"GNU.sparse.realsize", size)
            name = records.get(b"GNU.sparse.name", name)
            extents = self._sparse_map(size)
        attributes, xattrs = _attributes(block, records)
        return Member(
            name=name,
            kind=kind,
            attributes=attributes,
            size=size,
            link=records.get(b"linkpath") or block[157:257].partition(b"\0")[0],
            deleted=tuple(part for part in xattrs.get(DELETED, b"").split(b"/") if part),
            opaque=OPAQUE in xattrs,
            extents=extents,
        )

    def _sparse_map(self, size: int) -> tuple[tuple[int, int], ...]:
        """The text in front of the data: a count, then start and length of each extent, then zeros up to a block."""
        before, numbers, text = self._left, list[int](), b""
        wanted = 1
        while len(numbers) < wanted:
            line, found, rest = text.partition(b"\n")
            if found:
                numbers.append(_decimal(line))
                text = rest
                if len(numbers) == 1:
                    wanted = 1 + 2 * numbers[0]
            elif self._left < BLOCK or before - self._left >= _MAX_SPARSE_MAP_BYTES or len(text) > BLOCK:
                raise DamagedArchiveError("a sparse file without a map")
            else:
                text += self._exactly(BLOCK)
                self._left -= BLOCK
        extents = tuple(zip(numbers[1::2], numbers[2::2], strict=True))
        position = 0
        for start, length in extents:
            if start < position or start + length > size:
                raise DamagedArchiveError("a sparse file whose map makes no sense")
            position = start + length
        if sum(length for _, length in extents) != self._left:
            raise DamagedArchiveError("a sparse file with too much or too little data")
        return extents

    def _skip(self) -> None:
        for _ in self.content():
            pass
        if self._padding:
            self._exactly(self._padding)
            self._padding = 0

    def _meta(self, size: int) -> bytes:
        if size > MAX_RECORDS_BYTES:
            raise DamagedArchiveError("a header that is too large")
        return self._exactly(size + -size % BLOCK)[:size]

    def _exactly(self, size: int) -> bytes:
        piece = self._buffer[self._at : self._at + size]
        self._at += len(piece)
        while len(piece) < size:
            self._fill()
            more = self._buffer[: size - len(piece)]
            self._at = len(more)
            piece += more
        return piece

    def _some(self, size: int) -> bytes:
        if self._at >= len(self._buffer):
            self._fill()
        piece = self._buffer[self._at : self._at + size]
        self._at += len(piece)
        return piece

    def _fill(self) -> None:
        self._buffer, self._at = self._source.read(_PIECE_BYTES), 0
        if not self._buffer:
            raise DamagedArchiveError("it ends too early")


def _check(block: bytes) -> None:
    told = _number(block[148:156])
    if told != sum(block) - sum(block[148:156]) + 8 * 0x20:
        raise DamagedArchiveError("a header with a wrong checksum")


def _number(field: bytes) -> int:
    """Octal text, or GNU's binary form for large numbers."""
    if field[0] & 0x80:
        if field[0] & 0x40:
            raise DamagedArchiveError("a negative number")
        return int.from_bytes(bytes([field[0] & 0x3F]) + field[1:])
    text = field.strip(b" \0")
    try:
        return int(text, 8) if text else 0
    except ValueError:
        raise DamagedArchiveError("a number that is none") from None


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 19:
        raise DamagedArchiveError("a number that is none")
    return int(text)


def _record_number(records: dict[bytes, bytes], key: bytes, otherwise: int) -> int:
    return _decimal(records[key]) if key in records else otherwise


def _records(data: bytes) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    position = 0
    while position < len(data):
        blank = data.find(b" ", position, position + 20)
        length = _decimal(data[position:blank]) if blank > 0 else 0
        end = position + length
        key, equals, value = data[blank + 1 : end - 1].partition(b"=")
        if end > len(data) or end - 1 <= blank or not equals or data[end - 1 : end] != b"\n":
            raise DamagedArchiveError("an extended header that makes no sense")
        found[key] = value
        position = end
    return found


def _name(block: bytes) -> bytes:
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _attributes(block: bytes, records: dict[bytes, bytes]) -> tuple[Attributes, dict[bytes, bytes]]:
    """Those to be set, and all extended ones."""
    start = len(members.XATTR_PREFIX)
    xattrs = {key[start:]: value for key, value in records.items() if key.startswith(members.XATTR_PREFIX)}
    return Attributes(
        mode=stat.S_IMODE(_number(block[100:108])),
        uid=_record_number(records, b"uid", _number(block[108:116])),
        gid=_record_number(records, b"gid", _number(block[116:124])),
        mtime_ns=_mtime_ns(records.get(b"mtime"), _number(block[136:148])),
        xattrs={key: value for key, value in xattrs.items() if is_portable(key)},
    ), xattrs


def _mtime_ns(text: bytes | None, seconds: int) -> int:
    if text is None:
        return min(seconds, 1 << 33) * 1_000_000_000
    whole, _, fraction = text.removeprefix(b"-").partition(b".")
    value = min(_decimal(whole or b"0"), 1 << 33) * 1_000_000_000 + _decimal(fraction[:9].ljust(9, b"0"))
    return -value if text.startswith(b"-") else value
