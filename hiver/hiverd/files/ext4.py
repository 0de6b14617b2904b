"""Sparse ext4 images: one is made by mkfs, all others are copies of it with a UUID of their own.

Without a journal (a sandbox's disk need not survive a power cut), without backup superblocks (a broken one is thrown
away, not repaired) and with `metadata_csum_seed`, so that the UUID can change without rewriting every checksum. A copy
costs half a millisecond where mkfs costs 12.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from hiverd.contracts.errors import UnavailableError
from hiverd.files import linux

TEMPLATE_VERSION: Final = 2
"""Raised with every change to what `make_template` makes."""
_FEATURES: Final = "^has_journal,^resize_inode,metadata_csum,metadata_csum_seed,sparse_super2"
_MKFS_SECONDS: Final = 60
_SUPERBLOCK_OFFSET: Final = 1024
_SUPERBLOCK_BYTES: Final = 1024
_UUID_OFFSET: Final = 0x68
_CHECKSUM_OFFSET: Final = 0x3FC
_PIECE_BYTES: Final = 1 << 16


def mkfs_program() -> str | None:
    """Path of `mkfs.ext4`, also when `sbin` is not on the PATH."""
    search = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    return shutil.which("mkfs.ext4", path=search)


def make_template(path: Path, size_bytes: int) -> None:
    """Makes a sparse image with an empty file system; appears whole. Blocks. `UnavailableError` says why it failed."""
    program = mkfs_program()
    if program is None:
        raise UnavailableError("mkfs.ext4 is not installed")
    unfinished = path.with_name(path.name + ".tmp")
    fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size_bytes)
    finally:
        os.close(fd)
    argv = [program, "-q", "-F", "-b", "4096", "-m", "0", "-O", _FEATURES]
    argv += ["-E", "lazy_itable_init=1,nodiscard,num_backup_sb=0", str(unfinished)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=_MKFS_SECONDS, check=False)
    if done.returncode:
        unfinished.unlink(missing_ok=True)
        raise UnavailableError(f"mkfs.ext4 failed: {done.stderr.strip()[-300:]}")
    unfinished.rename(path)


class Template(NamedTuple):
    """An empty file system in memory: only a few dozen KiB of its image are not zero."""

    size_bytes: int
    pieces: tuple[tuple[int, bytes], ...]
    """(offset, content) of the written parts; the superblock lies within the first."""

    def copy_to(self, image: Path) -> None:
        """Writes a new sparse image that differs in its UUID only. Blocks. `FileExistsError` if there is one."""
        fd = os.open(image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, self.size_bytes)
            for offset, content in self.pieces:
                _write_all(fd, content, offset)
            block = renamed_superblock(self.pieces[0][1][_SUPERBLOCK_OFFSET:][:_SUPERBLOCK_BYTES])
            _write_all(fd, block, _SUPERBLOCK_OFFSET)
        finally:
            os.close(fd)


def read_template(path: Path) -> Template:
    """Reads what `make_template` made. Blocks. `UnavailableError` if it is none."""
    with path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        pieces = tuple(_written_parts(file.fileno(), size_bytes))
    if not pieces or pieces[0][0] != 0 or len(pieces[0][1]) < _SUPERBLOCK_OFFSET + _SUPERBLOCK_BYTES:
        raise UnavailableError(f"{path} holds no file system; remove it")
    return Template(size_bytes, pieces)


def _written_parts(fd: int, size_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Skips holes, and zeros where the host's file system does not tell about holes."""
    for start, end in linux.data_extents(fd, size_bytes):
        for offset in range(start, end, _PIECE_BYTES):
            content = os.pread(fd, min(_PIECE_BYTES, end - offset), offset)
            if content.strip(b"\0"):
                yield offset, content


def _write_all(fd: int, content: bytes, offset: int) -> None:
    rest = memoryview(content)
    while rest:
        count = os.pwrite(fd, rest, offset)
        rest, offset = rest[count:], offset + count


def renamed_superblock(superblock: bytes) -> bytes:
    """The superblock with a random UUID and its checksum (`fs/ext4/super.c`: CRC-32C of all before the checksum)."""
    block = bytearray(superblock)
    block[_UUID_OFFSET : _UUID_OFFSET + 16] = uuid.uuid4().bytes
    struct.pack_into("<I", block, _CHECKSUM_OFFSET, crc32c(bytes(block[:_CHECKSUM_OFFSET])))
    return bytes(block)


def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        crc = value
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_TABLE: Final = _crc_table()


def crc32c(data: bytes) -> int:
    """Castagnoli CRC as ext4 uses it: started at all ones and not inverted at the end."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc
