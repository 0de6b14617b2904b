"""fanotify as the kernel speaks it: one group, its marks, a parser of what is read (`linux/fanotify.h`, fanotify(7)).

Events name directories by file handles, which stay the same however often a directory is renamed. All of this needs
CAP_SYS_ADMIN, and finding a path by a handle CAP_DAC_READ_SEARCH.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from hiverd.files import handles

ACCESS: Final = 0x1
MODIFY: Final = 0x2
MOVED_FROM: Final = 0x40
MOVED_TO: Final = 0x80
CREATE: Final = 0x100
DELETE: Final = 0x200
QUEUE_OVERFLOW: Final = 0x4000
ON_DIRECTORY: Final = 0x40000000

WATCHED: Final = ACCESS | MODIFY | MOVED_FROM | MOVED_TO | CREATE | DELETE | ON_DIRECTORY

READ_BYTES: Final = 256 << 10

_CLOEXEC, _NONBLOCK, _UNLIMITED_QUEUE, _UNLIMITED_MARKS = 0x1, 0x2, 0x10, 0x20
_REPORT_FID, _REPORT_DIRECTORY, _REPORT_NAME, _REPORT_TARGET = 0x200, 0x400, 0x800, 0x1000
_BASE: Final = _CLOEXEC | _NONBLOCK | _UNLIMITED_QUEUE | _UNLIMITED_MARKS | _REPORT_DIRECTORY | _REPORT_NAME
_INIT_FLAGS: Final = (_BASE | _REPORT_FID | _REPORT_TARGET, _BASE)
"""The first that works: handles of the things themselves came with Linux 5.17, names with 5.9."""
_MARK_ADD, _MARK_REMOVE, _MARK_FILESYSTEM = 0x1, 0x2, 0x100
_AT_FDCWD: Final = -100

_METADATA_VERSION: Final = 3
_INFO_FID, _INFO_NAMED_DIRECTORY, _INFO_DIRECTORY = 1, 2, 3
_METADATA: Final = struct.Struct("=IBBHQii")
_INFO: Final = struct.Struct("=BBH8sIi")
_EVENT: Final = struct.Struct("=IBBHQiiBBH8sIi")
"""Metadata, then the first record's head: type, padding, length, fsid, size and type of its handle."""
_HANDLE_AT: Final = _METADATA.size + 12
_HANDLE_HEAD_BYTES: Final = 8
_SIZE: Final = struct.Struct("=I")
_LENGTH_AND_FSID: Final = struct.Struct("=I24x8s")

_libc = ctypes.CDLL(None, use_errno=True)


class FileEvent(NamedTuple):
    """Something that happened to `name` in a directory; `mask` may hold several kinds that happened to it."""

    fsid: bytes
    """Of the file system, 8 bytes; empty for what concerns the group itself."""
    mask: int
    pid: int
    directory: bytes
    """A whole `struct file_handle`; of the file itself where the kernel does not know its directory."""
    name: bytes
    """`.` for the directory itself; empty if unknown."""
    itself: bytes
    """The handle of what the name stands for; empty if the kernel does not tell."""


class Group:
    """A group of class NOTIF with an unlimited queue. Marks may be set by any thread; one thread reads."""

    def __init__(self) -> None:
        """Raises `OSError` where the kernel or missing capabilities forbid it."""
        self._fd = _init()

    def fileno(self) -> int:
        return self._fd

    def watch(self, folder: Path) -> None:
        """Marks the file system that `folder` is on. Raises `OSError`: EOPNOTSUPP, ENODEV, EXDEV if it has no handles
        or no id."""
        self._mark(_MARK_ADD, folder)

    def unwatch(self, folder: Path) -> None:
        """Raises `OSError`: ENOENT if it is not watched."""
        self._mark(_MARK_REMOVE, folder)

    def _mark(self, action: int, folder: Path) -> None:
        flags = ctypes.c_uint(action | _MARK_FILESYSTEM)
        path = os.fsencode(folder)
        _check(_libc.fanotify_mark(self._fd, flags, ctypes.c_uint64(WATCHED), _AT_FDCWD, path), str(folder))

    def read(self) -> bytes:
        """Some events; empty if there are none now."""
        try:
            return os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        """Marks go with it. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _init() -> int:
    for flags in _INIT_FLAGS:
        fd = int(_libc.fanotify_init(ctypes.c_uint(flags), ctypes.c_uint(os.O_RDONLY)))
        if fd >= 0:
            return fd
        if ctypes.get_errno() != errno.EINVAL:
            break
    return _check(-1, "fanotify_init")


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def positions(buffer: bytes) -> Iterator[tuple[int, bytes]]:
    """(position, fsid) of each event: a tenth of the work of reading it. Raises ValueError for what is no event."""
    position, end = 0, len(buffer)
    unpack, least = _LENGTH_AND_FSID.unpack_from, _METADATA.size
    while position < end:
        if end - position < _LENGTH_AND_FSID.size:  # the last one, and it bears no record
            yield position, b""
            return
        length, fsid = unpack(buffer, position)
        if length < least:
            raise ValueError(f"an event of {length} bytes")
        yield position, fsid if length >= _EVENT.size else b""
        position += length


def event_at(buffer: bytes, position: int) -> FileEvent:
    """The event at one of `positions`."""
    if len(buffer) - position < _EVENT.size or _SIZE.unpack_from(buffer, position)[0] < _EVENT.size:
        _, version, _, metadata_bytes, mask, _, pid = _METADATA.unpack_from(buffer, position)
        _require_version(version, metadata_bytes)
        return FileEvent(b"", mask, pid, b"", b"", b"")
    head = _EVENT.unpack_from(buffer, position)
    length, version, _, metadata_bytes, mask, _, pid, kind, _, record_bytes, fsid, handle_bytes, _ = head
    _require_version(version, metadata_bytes)
    start = position + _HANDLE_AT
    handle_end = start + _HANDLE_HEAD_BYTES + handle_bytes
    record_end = position + _METADATA.size + record_bytes
    name = b""
    if kind == _INFO_NAMED_DIRECTORY:
        name_end = buffer.find(b"\0", handle_end, record_end)
        name = buffer[handle_end : record_end if name_end < 0 else name_end]
    end = position + length
    itself = _second_handle(buffer, record_end) if record_end + _INFO.size <= end else b""
    return FileEvent(fsid, mask, pid, buffer[start:handle_end], name, itself)


def _require_version(version: int, metadata_bytes: int) -> None:
    if version != _METADATA_VERSION or metadata_bytes != _METADATA.size:
        raise ValueError(f"events of version {version}")


def _second_handle(buffer: bytes, position: int) -> bytes:
    kind, _, _, _, handle_bytes, _ = _INFO.unpack_from(buffer, position)
    if kind != _INFO_FID:
        return b""
    start = position + 12
    return buffer[start : start + _HANDLE_HEAD_BYTES + handle_bytes]


def parse(buffer: bytes) -> Iterator[FileEvent]:
    """Every event of what was read. Raises ValueError for what is none."""
    for position, _ in positions(buffer):
        yield event_at(buffer, position)


class _StatFs(ctypes.Structure):
    # As on every 64-bit architecture (asm-generic/statfs.h); what follows only has to be large enough.
    _fields_ = (("before", ctypes.c_long * 7), ("f_fsid", ctypes.c_byte * 8), ("rest", ctypes.c_byte * 448))


def fsid_of(fd: int) -> bytes:
    """The id of a file system as events bear it (`f_fsid` of statfs)."""
    buffer = _StatFs()
    _check(_libc.fstatfs(fd, ctypes.byref(buffer)), "fstatfs")
    return bytes(buffer.f_fsid)


def problem(folder: Path) -> str | None:
    """Why file systems cannot be watched here; None if they can. Leaves nothing."""
    try:
        group = Group()
    except OSError as error:
        return f"fanotify_init: {error.strerror}"
    try:
        return _mark_problem(group, folder) or _handle_problem(folder)
    finally:
        group.close()


def _mark_problem(group: Group, folder: Path) -> str | None:
    try:
        group.watch(folder)
    except OSError as error:
        # The folder's own file system may well lack what an ext4 has.
        if error.errno not in {errno.EOPNOTSUPP, errno.ENODEV, errno.EXDEV}:
            return f"fanotify_mark: {error.strerror}"
    return None


def _handle_problem(folder: Path) -> str | None:
    nothing = struct.pack("=Ii8x", 8, 1)
    mount_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.close(handles.open_path(mount_fd, nothing))
    except OSError as error:
        if error.errno == errno.EPERM:
            return f"open_by_handle_at: {error.strerror}"
    finally:
        os.close(mount_fd)
    return None
