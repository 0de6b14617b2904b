"""The kernel's FUSE protocol, as far as we speak it: `linux/fuse.h`, 7.31 and later (kernel 5.4 and later).

Numbers are in the machine's own byte order; requests and answers never leave the machine.
"""

from __future__ import annotations

import sys
from struct import Struct
from typing import Final

MAJOR: Final = 7
MINOR: Final = 38
"""The newest version whose structures we know. The kernel and we use the smaller minor number of both."""
OLDEST_MINOR: Final = 31
ROOT_ID: Final = 1

# --- operations ---

LOOKUP: Final = 1
FORGET: Final = 2
GETATTR: Final = 3
SETATTR: Final = 4
READLINK: Final = 5
SYMLINK: Final = 6
MKNOD: Final = 8
MKDIR: Final = 9
UNLINK: Final = 10
RMDIR: Final = 11
RENAME: Final = 12
LINK: Final = 13
OPEN: Final = 14
READ: Final = 15
WRITE: Final = 16
STATFS: Final = 17
RELEASE: Final = 18
FSYNC: Final = 20
INIT: Final = 26
OPENDIR: Final = 27
READDIR: Final = 28
RELEASEDIR: Final = 29
FSYNCDIR: Final = 30
CREATE: Final = 35
INTERRUPT: Final = 36
DESTROY: Final = 38
IOCTL: Final = 39
BATCH_FORGET: Final = 42
FALLOCATE: Final = 43
READDIRPLUS: Final = 44
RENAME2: Final = 45
LSEEK: Final = 46
COPY_FILE_RANGE: Final = 47

# --- what INIT agrees on ---

ASYNC_READ: Final = 1 << 0
ATOMIC_O_TRUNC: Final = 1 << 3
BIG_WRITES: Final = 1 << 5
AUTO_INVAL_DATA: Final = 1 << 12
DO_READDIRPLUS: Final = 1 << 13
READDIRPLUS_AUTO: Final = 1 << 14
ASYNC_DIO: Final = 1 << 15
PARALLEL_DIROPS: Final = 1 << 18
MAX_PAGES: Final = 1 << 22
CACHE_SYMLINKS: Final = 1 << 23
EXPLICIT_INVAL_DATA: Final = 1 << 25
INIT_EXT: Final = 1 << 30
HAS_EXPIRE_ONLY: Final = 1 << 3
"""In the second word of flags."""

MAX_REQUEST_PAGES: Final = 256
MAX_REQUEST_BYTES: Final = MAX_REQUEST_PAGES * 4096
"""The payload of one READ or WRITE, at most."""
REQUEST_BUFFER_BYTES: Final = MAX_REQUEST_BYTES + 4096

# --- flags of single operations ---

GETATTR_FH: Final = 1 << 0

FATTR_MODE: Final = 1 << 0
FATTR_UID: Final = 1 << 1
FATTR_GID: Final = 1 << 2
FATTR_SIZE: Final = 1 << 3
FATTR_ATIME: Final = 1 << 4
FATTR_MTIME: Final = 1 << 5
FATTR_FH: Final = 1 << 6
FATTR_ATIME_NOW: Final = 1 << 7
FATTR_MTIME_NOW: Final = 1 << 8

FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_KEEP_CACHE: Final = 1 << 1

WRITE_CACHE: Final = 1 << 0
"""Of WRITE: pages of a shared mapping; the handle is any that is open for writing, and there is no caller."""
FSYNC_FDATASYNC: Final = 1 << 0

NOTIFY_INVAL_INODE: Final = 2
NOTIFY_INVAL_ENTRY: Final = 3
EXPIRE_ONLY: Final = 1 << 0

# --- structures ---

_ATTR: Final = "QQQqqqIIIIIIIIII"

OPERATION_BYTE: Final = 4 if sys.byteorder == "little" else 7
"""Where a request says what it is: all numbers are below 256."""
IN_HEADER: Final = Struct("=IIQQIIIHH")
"""length, operation, unique, node, uid, gid, pid, extensions (8-byte units), padding"""
OUT_HEADER: Final = Struct("=IiQ")
"""length, error (0 or -errno), unique"""
INIT_IN: Final = Struct("=IIII")
"""major, minor, max_readahead, flags; flags2 follows where the kernel has it"""
INIT_OUT: Final = Struct("=IIIIHHIIHHI28x")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages,
map_alignment, flags2"""
ATTR_OUT: Final = Struct("=QII" + _ATTR)
"""validity in seconds, its nanoseconds, padding, attributes"""
ENTRY_OUT: Final = Struct("=QQQQII" + _ATTR)
"""node, generation, validity of the name and of the attributes in seconds, their nanoseconds, attributes"""
FORGET_IN: Final = Struct("=Q")
FORGET_ONE: Final = Struct("=QQ")
BATCH_FORGET_IN: Final = Struct("=II")
GETATTR_IN: Final = Struct("=IIQ")
SETATTR_IN: Final = Struct("=IIQQQqqqIIIIIIII")
"""valid, padding, handle, size, lock_owner, atime, mtime, ctime, their nanoseconds, mode, unused, uid, gid, unused"""
MKNOD_IN: Final = Struct("=IIII")
MKDIR_IN: Final = Struct("=II")
RENAME_IN: Final = Struct("=Q")
RENAME2_IN: Final = Struct("=QII")
OPEN_IN: Final = Struct("=II")
CREATE_IN: Final = Struct("=IIII")
"""flags, mode, umask, open_flags"""
OPEN_OUT: Final = Struct("=QII")
RELEASE_IN: Final = Struct("=QIIQ")
READ_IN: Final = Struct("=QQIIQII")
"""handle, offset, size, read_flags, lock_owner, flags, padding"""
WRITE_IN: Final = READ_IN
WRITE_OUT: Final = Struct("=II")
STATFS_OUT: Final = Struct("=QQQQQIII28x")
FSYNC_IN: Final = Struct("=QII")
FALLOCATE_IN: Final = Struct("=QQQII")
LSEEK_IN: Final = Struct("=QQII")
LSEEK_OUT: Final = Struct("=Q")
COPY_FILE_RANGE_IN: Final = Struct("=QQQQQQQ")
"""handle in, offset in, node out, handle out, offset out, length, flags"""
DIRENT: Final = Struct("=QQII")
"""inode, offset of the next one, length of the name, type; the name follows, padded to 8 bytes"""
INVAL_INODE_OUT: Final = Struct("=Qqq")
INVAL_ENTRY_OUT: Final = Struct("=QII")
