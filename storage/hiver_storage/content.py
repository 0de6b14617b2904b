"""The content of a write, as the size of a request wants it."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator


def _wrong_size(size: int) -> OSError:
    return OSError(errno.EINVAL, f"the content is not {size} bytes long")


async def whole(content: AsyncIterator[bytes], size: int) -> bytes:
    """All of it. Raises OSError EINVAL if that is not `size` bytes."""
    gathered = bytearray()
    async for piece in content:
        gathered += piece
        if len(gathered) > size:
            raise _wrong_size(size)
    if len(gathered) != size:
        raise _wrong_size(size)
    return bytes(gathered)


class Parts:
    """Content in parts of one size; only the last may be smaller. One part is held at a time."""

    def __init__(self, content: AsyncIterator[bytes], size: int, part_bytes: int) -> None:
        self.size = size
        self._content = content
        self._part_bytes = part_bytes

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Raises OSError EINVAL if the parts are not `size` bytes together, before the last of them."""
        held = bytearray()
        seen = 0
        async for piece in self._content:
            held += piece
            seen += len(piece)
            if seen > self.size:
                raise _wrong_size(self.size)
            # The last part is told only when the content has ended: it may be what makes the object.
            while len(held) > self._part_bytes:
                part, held = bytes(held[: self._part_bytes]), held[self._part_bytes :]
                yield part
        if seen != self.size:
            raise _wrong_size(self.size)
        yield bytes(held)
