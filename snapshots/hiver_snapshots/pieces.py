"""What both stores do with the bytes that pass."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

BLOCK_BYTES: Final = 1 << 20
_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_GZIP: Final = b"\x1f\x8b"


async def blocks(content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in pieces that are worth the way to a thread; the last may be shorter. Never an empty one."""
    gathered = bytearray()
    async for piece in content:
        if len(piece) >= BLOCK_BYTES and not gathered:
            yield piece
            continue
        gathered += piece
        if len(gathered) >= BLOCK_BYTES:
            yield bytes(gathered)
            gathered.clear()
    if gathered:
        yield bytes(gathered)


def suffix_of(head: bytes) -> str:
    """The ending of a file's name that lets people and `tar` know what it is."""
    if head.startswith(_ZSTD):
        return ".tar.zst"
    return ".tar.gz" if head.startswith(_GZIP) else ".tar"
