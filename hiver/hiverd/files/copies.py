"""Copies of files with all that belongs to them: owner, mode, times, extended attributes, holes. All of it blocks."""

from __future__ import annotations

import os
from typing import Final

from hiverd.files import linux

_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MAKE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_PIECE_BYTES: Final = 64 << 20


def copy_file(name: str, directory: int, target: str, target_directory: int) -> None:
    """Copies a regular file to a new one, sharing blocks where the file system can. Raises `OSError`; an unfinished
    copy may be left then."""
    source = os.open(name, _READ, dir_fd=directory)
    try:
        copy = os.open(target, _MAKE, 0o600, dir_fd=target_directory)
        try:
            _copy_content(source, copy)
            copy_metadata(source, copy)
        finally:
            os.close(copy)
    finally:
        os.close(source)


def _copy_content(source: int, copy: int) -> None:
    size = os.fstat(source).st_size
    os.ftruncate(copy, size)
    for start, end in linux.data_extents(source, size):
        position = start
        while position < end:
            count = os.copy_file_range(source, copy, min(end - position, _PIECE_BYTES), position, position)
            if not count:  # cut short meanwhile
                return
            position += count


def copy_metadata(source: int, copy: int) -> None:
    """Owner, extended attributes (access lists and capabilities among them), mode, times, in the order in which none
    undoes another."""
    found = os.fstat(source)
    os.fchown(copy, found.st_uid, found.st_gid)
    for name in os.listxattr(source):
        os.setxattr(copy, name, os.getxattr(source, name))
    os.fchmod(copy, found.st_mode & 0o7777)
    os.utime(copy, ns=(found.st_atime_ns, found.st_mtime_ns))
