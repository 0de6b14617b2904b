"""Reading files into members. Blocking; runs in the worker process."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from hiverd.files.linux import data_extents
from hiverd.snapshots import members
from hiverd.snapshots.members import Attributes
from hiverd.snapshots.spool import Spool

SMALL_BYTES: Final = 1 << 20
"""Files up to this size share frames; larger ones have frames of their own, and are read piece by piece."""
_PIECE_BYTES: Final = 1 << 20
_SECTOR_BYTES: Final = 512


def add_file(spool: Spool, name: bytes, descriptor: int, status: os.stat_result, attributes: Attributes) -> None:
    """A regular file. What it has lost since `status` was read becomes zeros; what it has gained is left out."""
    size = status.st_size
    if status.st_blocks * _SECTOR_BYTES < size:
        extents = [(start, end - start) for start, end in data_extents(descriptor, size)]
        if extents != [(0, size)]:
            _add_sparse(spool, name, descriptor, size, attributes, extents)
            return
    head = members.header(name, members.REGULAR, attributes, size=size)
    if size <= SMALL_BYTES:
        content = os.read(descriptor, size) if size else b""
        if len(content) < size:
            content = _exactly(descriptor, content, size)
        spool.member(name, head, content + bytes(-size % members.BLOCK))
        return
    spool.large_member(name, head, lambda take: _copy(descriptor, [(0, size)], take))


def _add_sparse(
    spool: Spool, name: bytes, descriptor: int, size: int, attributes: Attributes, extents: list[tuple[int, int]]
) -> None:
    if not extents or extents[-1][0] + extents[-1][1] < size:
        extents.append((size, 0))  # where the file ends, as GNU tar writes it
    head = members.sparse_header(name, attributes, size, extents)
    spool.large_member(name, head, lambda take: _copy(descriptor, extents, take))


def _copy(descriptor: int, extents: list[tuple[int, int]], take: Callable[[bytes], None]) -> None:
    stored = 0
    for start, length in extents:
        position, end = start, start + length
        while position < end:
            piece = os.pread(descriptor, min(_PIECE_BYTES, end - position), position)
            if not piece:
                piece = bytes(min(_PIECE_BYTES, end - position))
            take(piece)
            position += len(piece)
        stored += length
    take(members.padding(stored))


def _exactly(descriptor: int, content: bytes, size: int) -> bytes:
    while len(content) < size:
        piece = os.read(descriptor, size - len(content))
        if not piece:
            return content.ljust(size, b"\0")
        content += piece
    return content
