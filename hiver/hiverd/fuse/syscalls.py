"""Linux calls that `os` lacks and the FUSE server needs. Thin; they raise `OSError`."""

from __future__ import annotations

import ctypes
import os
from typing import Final

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
_CLONE_FS: Final = 0x200
_PR_GET_SECUREBITS: Final = 27
_PR_SET_SECUREBITS: Final = 28
_SECBIT_NO_SETUID_FIXUP: Final = 1 << 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
_libc.setfsuid.argtypes = [ctypes.c_uint]
_libc.setfsgid.argtypes = [ctypes.c_uint]
_set_fsuid = _libc.setfsuid
_set_fsgid = _libc.setfsgid


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def renameat2(source_fd: int, source: bytes, target_fd: int, target: bytes, flags: int) -> None:
    _check(_libc.renameat2(source_fd, source, target_fd, target, flags))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    _check(_libc.fallocate(fd, mode, offset, length))


def own_thread_identity() -> None:
    """Gives the calling thread a umask of its own, 0, and lets it change its file-system ids without losing
    capabilities (prctl(2), SECBIT_NO_SETUID_FIXUP), so that both cost nothing per request. `PermissionError`."""
    _check(_libc.unshare(_CLONE_FS))
    os.umask(0)
    bits = _check(_libc.prctl(_PR_GET_SECUREBITS, 0, 0, 0, 0))
    _check(_libc.prctl(_PR_SET_SECUREBITS, bits | _SECBIT_NO_SETUID_FIXUP, 0, 0, 0))


def become(uid: int, gid: int) -> None:
    """What the calling thread creates from now on belongs to these ids."""
    _set_fsgid(gid)
    _set_fsuid(uid)
