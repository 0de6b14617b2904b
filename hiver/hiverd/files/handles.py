"""File handles: names of inodes that hold however they are moved (name_to_handle_at(2)). Need CAP_DAC_READ_SEARCH."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

MAX_HANDLE_BYTES: Final = 128
_AT_EMPTY_PATH: Final = 0x1000
_HEAD: Final = struct.Struct("=Ii")

_libc = ctypes.CDLL(None, use_errno=True)


def of(fd: int) -> bytes:
    """The whole `struct file_handle` of what a descriptor stands for. Raises `OSError`: EOPNOTSUPP where the file
    system has none."""
    buffer = ctypes.create_string_buffer(_HEAD.pack(MAX_HANDLE_BYTES, 0), _HEAD.size + MAX_HANDLE_BYTES)
    mount_id = ctypes.c_int()
    _check(_libc.name_to_handle_at(fd, b"", buffer, ctypes.byref(mount_id), _AT_EMPTY_PATH), "name_to_handle_at")
    handle_bytes, _ = _HEAD.unpack_from(buffer.raw)
    return buffer.raw[: _HEAD.size + handle_bytes]


def open_path(mount_fd: int, handle: bytes) -> int:
    """An O_PATH descriptor. `mount_fd`: anything open on that file system, but not with O_PATH.

    Raises `OSError`: ESTALE for what is gone, EPERM without CAP_DAC_READ_SEARCH.
    """
    return _open(mount_fd, handle, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)


def open_directory(mount_fd: int, handle: bytes) -> int:
    """For reading. Raises `OSError` as `open_path`."""
    return _open(mount_fd, handle, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _open(mount_fd: int, handle: bytes, flags: int) -> int:
    return _check(_libc.open_by_handle_at(mount_fd, handle, flags), "open_by_handle_at")


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result
