"""What a snapshot in a mount says of itself: a few bytes behind the archive, which every unpacker passes over. Pure.

A mount holds one file per key (PROTOCOL 3.16), and one file is replaced in one step; a second one with the checksum
would be a moment behind. Behind zstd the trailer is a skippable frame (RFC 8878, 3.1.2), behind gzip an empty member
with an extra field (RFC 1952, 2.3.1.1): `tar xf` reads such an archive as any other.
"""

from __future__ import annotations

import struct
from typing import Final

from hiverd.contracts.snapshot import version_time

_WORD: Final = b"hiver.snapshot.1"
_PAYLOAD: Final = struct.Struct(">16s31s32sQ")
_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_GZIP: Final = b"\x1f\x8b"
_FRAME_HEAD: Final = struct.pack("<II", 0x184D2A50, _PAYLOAD.size)
_SUBFIELD: Final = b"Hv"
_MEMBER_HEAD: Final = _GZIP + struct.pack(
    "<BBIBBH2sH", 8, 0x04, 0, 0, 0xFF, 4 + _PAYLOAD.size, _SUBFIELD, _PAYLOAD.size
)
_MEMBER_END: Final = b"\x03\x00" + bytes(8)
"""An empty deflate block, and the checksum and the length of nothing."""
TRAILER_MAX_BYTES: Final = len(_MEMBER_HEAD) + _PAYLOAD.size + len(_MEMBER_END)
SUFFIXES: Final = (".tar.gz", ".tar.zst", ".tar")


def suffix_of(head: bytes) -> str:
    """The ending of an archive's name, by its first bytes."""
    if head.startswith(_ZSTD):
        return ".tar.zst"
    return ".tar.gz" if head.startswith(_GZIP) else ".tar"


def trailer(head: bytes, version: str, sha256: str, size: int) -> bytes:
    """For an archive of `size` bytes that begins with `head`."""
    payload = _PAYLOAD.pack(_WORD, version.encode("ascii"), bytes.fromhex(sha256), size)
    if head.startswith(_GZIP):
        return _MEMBER_HEAD + payload + _MEMBER_END
    return _FRAME_HEAD + payload


def parsed(tail: bytes, file_size: int) -> tuple[str, str, int] | None:
    """(version, SHA-256, size of the archive), from the last bytes of a file; None: it is not of ours."""
    for before, after in ((_FRAME_HEAD, b""), (_MEMBER_HEAD, _MEMBER_END)):
        size = len(before) + _PAYLOAD.size + len(after)
        found = tail[-size:]
        if len(found) != size or not found.startswith(before) or not found.endswith(after):
            continue
        word, version, digest, content = _PAYLOAD.unpack_from(found, len(before))
        text = version.decode("ascii", "replace")
        if word == _WORD and content + size == file_size and version_time(text) is not None:
            return text, digest.hex(), content
    return None
