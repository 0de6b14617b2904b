"""The few Linux calls that Python's `os` lacks, as thin functions that raise `OSError`.

Numbers come from the kernel's own headers (`linux/openat2.h`, `linux/mount.h`, `linux/capability.h`). Every function
here may block and is meant for worker threads.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

SYS_OPENAT2: Final = 437
"""The same on every architecture: numbers from 424 on are shared."""

RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08
RESOLVE_IN_ROOT: Final = 0x10

MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOATIME: Final = 1024
MNT_DETACH: Final = 2
EXT4_MAGIC: Final = 0xEF53

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_CAPABILITY_VERSION_3: Final = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.setfsuid.argtypes = [ctypes.c_uint]
_libc.setfsgid.argtypes = [ctypes.c_uint]


def _check(result: int, what: bytes | str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(what))
    return result


def openat2(directory_fd: int, path: bytes, flags: int, resolve: int, mode: int = 0) -> int:
    """`openat2(2)`: a new descriptor. `EAGAIN`: a rename raced with `..`; the caller decides about retries."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, resolve)
    result = _libc.syscall(
        ctypes.c_long(SYS_OPENAT2),
        ctypes.c_long(directory_fd),
        ctypes.c_char_p(path),
        ctypes.c_char_p(how),
        ctypes.c_size_t(len(how)),
    )
    return _check(result, path)


def exchange(directory_fd: int, name: str, path: Path) -> None:
    """`renameat2(2)` with RENAME_EXCHANGE: an entry of a directory and `path` change places, in one step."""
    result = _libc.renameat2(
        directory_fd, os.fsencode(name), _AT_FDCWD, os.fsencode(path), ctypes.c_uint(_RENAME_EXCHANGE)
    )
    _check(result, str(path))


def mount(source: str, target: str, filesystem: str, flags: int, options: str) -> None:
    _check(
        _libc.mount(
            os.fsencode(source), os.fsencode(target), filesystem.encode(), ctypes.c_ulong(flags), options.encode()
        ),
        target,
    )


def umount(target: str, flags: int = 0) -> None:
    """`umount2(2)`. `EINVAL`: nothing is mounted there."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of what is not a hole in a file's first `size` bytes."""
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole follows
                return
            raise
        position = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, position


def keep_freed_memory() -> None:
    """Lets glibc keep up to 16 MiB of freed memory, for the whole process; a no-op with another C library.

    Bodies arrive in pieces of 256 KiB. With the defaults each piece's memory goes back to the kernel and comes again,
    page by page: an upload of 1 GiB took 100,000 page faults and twice the time.
    """
    with suppress(AttributeError):
        _libc.mallopt(_M_MMAP_THRESHOLD, 8 << 20)
        _libc.mallopt(_M_TRIM_THRESHOLD, 16 << 20)


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilitySet(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def _capabilities() -> ctypes.Array[_CapabilitySet]:
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    sets = (_CapabilitySet * 2)()
    _check(_libc.capget(ctypes.byref(header), sets), "capget")
    return sets


def _set_capabilities(sets: ctypes.Array[_CapabilitySet]) -> None:
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(ctypes.byref(header), sets), "capset")


@contextmanager
def creating_as(uid: int, gid: int) -> Iterator[None]:
    """Makes what this thread creates belong to `uid` and `gid` from its first moment on, with root's access otherwise.

    Beyond never showing a file of the wrong owner, it is what lets the server create at all on file systems whose ids
    are mapped (a tmpfs that the sandbox mounted in its user namespace, an id-mapped mount): there host id 0 has no
    counterpart and creation fails with EOVERFLOW. Only the calling thread is concerned; leaving 0 drops the
    file capabilities, so they are raised again.
    """
    before = _capabilities()
    old_uid, old_gid = _libc.setfsuid(0xFFFFFFFF), _libc.setfsgid(0xFFFFFFFF)
    try:
        _libc.setfsgid(gid)
        _libc.setfsuid(uid)
        if (_libc.setfsuid(0xFFFFFFFF), _libc.setfsgid(0xFFFFFFFF)) != (uid, gid):
            raise PermissionError(f"cannot act as {uid}:{gid}")
        _set_capabilities(before)
        yield
    finally:
        _libc.setfsuid(old_uid)
        _libc.setfsgid(old_gid)
        _set_capabilities(before)


class _StatFs(ctypes.Structure):
    # f_type comes first on every 64-bit architecture; the rest only has to be large enough.
    _fields_ = (("f_type", ctypes.c_long), ("rest", ctypes.c_byte * 512))


def filesystem_magic(fd: int) -> int:
    """`f_type` of the file system behind a descriptor (O_PATH will do), as in `linux/magic.h`."""
    buffer = _StatFs()
    _check(_libc.fstatfs(fd, ctypes.byref(buffer)), "fstatfs")
    return int(buffer.f_type) & 0xFFFFFFFF
