"""Members of an archive as bytes: ustar headers, with pax records where ustar has no place (POSIX.1-2017, pax).

What tar has no form for goes along as an extended attribute of a folder, which every tar can skip:
`user.hiver.deleted` names files of the image that were deleted in it, separated by slashes, and `user.hiver.opaque`
says that nothing of the image is left in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

BLOCK: Final = 512
REGULAR: Final = b"0"
HARD_LINK: Final = b"1"
SYMLINK: Final = b"2"
DIRECTORY: Final = b"5"
FIFO: Final = b"6"
END: Final = bytes(2 * BLOCK)
DELETED: Final = b"user.hiver.deleted"
OPAQUE: Final = b"user.hiver.opaque"
OWN_PREFIX: Final = b"user.hiver."
XATTR_PREFIX: Final = b"SCHILY.xattr."
SPARSE_MEMBER: Final = b"GNUSparseFile.0/"
_NAME_BYTES: Final = 100
_MAX_OCTAL_SIZE: Final = 8**11 - 1
_MAX_OCTAL_ID: Final = 8**7 - 1
_MAGIC: Final = b"ustar\x0000"
_DEVICE: Final = b"0000000\0" * 2 + bytes(155 + 12)


class Attributes(NamedTuple):
    """Of a member, as they are inside the sandbox."""

    mode: int
    """Permission bits."""
    uid: int
    gid: int
    mtime_ns: int
    xattrs: Mapping[bytes, bytes] = {}


def padding(size: int) -> bytes:
    """What fills the last block behind so many bytes."""
    return bytes(-size % BLOCK)


def header(
    name: bytes, kind: bytes, attributes: Attributes, *, size: int = 0, link: bytes = b"", records: bytes = b""
) -> bytes:
    """A member's header, with a pax header in front where one is needed. `size`: of the content that follows.

    `records`: further pax records.
    """
    seconds, nanoseconds = divmod(attributes.mtime_ns, 1_000_000_000)
    if nanoseconds or not 0 <= seconds <= _MAX_OCTAL_SIZE:
        records += record(b"mtime", _time(attributes.mtime_ns))
    records += b"".join(record(XATTR_PREFIX + key, value) for key, value in attributes.xattrs.items())
    if len(name) > _NAME_BYTES or not name.isascii():
        records += record(b"path", name)
    if len(link) > _NAME_BYTES or not link.isascii():
        records += record(b"linkpath", link)
    if size > _MAX_OCTAL_SIZE:
        records += record(b"size", b"%d" % size)
    for key, number in ((b"uid", attributes.uid), (b"gid", attributes.gid)):
        if number > _MAX_OCTAL_ID:
            records += record(key, b"%d" % number)
    block = _ustar(name, kind, attributes, max(0, min(seconds, _MAX_OCTAL_SIZE)), size, link)
    if not records:
        return block
    plain = Attributes(0o644, 0, 0, 0)
    extended = _ustar(b"PaxHeaders/" + name[-80:].replace(b"/", b"_"), b"x", plain, 0, len(records), b"")
    return b"".join((extended, records, padding(len(records)), block))


def record(key: bytes, value: bytes) -> bytes:
    """One pax record: its own length, a blank, key=value, a newline."""
    bare = len(key) + len(value) + 3
    length = bare + len(str(bare))
    if len(str(length)) > len(str(bare)):
        length = bare + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def sparse_header(name: bytes, attributes: Attributes, size: int, extents: list[tuple[int, int]]) -> bytes:
    """A file with holes in GNU's format 1.0: the header and the map that comes before the data of `extents`, which are
    (start, length). `size`: with the holes."""
    numbers = [len(extents), *(number for extent in extents for number in extent)]
    table = b"".join(b"%d\n" % number for number in numbers)
    table += padding(len(table))
    records = b"".join(
        (
            record(b"GNU.sparse.major", b"1"),
            record(b"GNU.sparse.minor", b"0"),
            record(b"GNU.sparse.name", name),
            record(b"GNU.sparse.realsize", b"%d" % size),
        )
    )
    stored = len(table) + sum(length for _, length in extents)
    return header(SPARSE_MEMBER + name, REGULAR, attributes, size=stored, records=records) + table


def deleted_names(names: Iterable[bytes]) -> bytes:
    """The value of `user.hiver.deleted`."""
    return b"/".join(names)


def _time(mtime_ns: int) -> bytes:
    sign = b"-" if mtime_ns < 0 else b""
    return b"%s%d.%09d" % (sign, *divmod(abs(mtime_ns), 1_000_000_000))


def _ustar(name: bytes, kind: bytes, attributes: Attributes, mtime: int, size: int, link: bytes) -> bytes:
    head = b"%s%07o\0%07o\0%07o\0%011o\0%011o\0" % (
        name[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0"),
        attributes.mode & 0o7777,
        min(attributes.uid, _MAX_OCTAL_ID),
        min(attributes.gid, _MAX_OCTAL_ID),
        min(size, _MAX_OCTAL_SIZE),
        mtime,
    )
    tail = b"%s%s%s%s%s" % (
        kind,
        link[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0"),
        _MAGIC,
        bytes(64),
        _DEVICE,
    )
    checksum = sum(head) + sum(tail) + 8 * 0x20
    return b"%s%06o\0 %s" % (head, checksum, tail)
