"""What the kernel's errors mean to a caller of the file API (PROTOCOL 3.10)."""

from __future__ import annotations

import errno
from typing import ClassVar, Final

from hiverd.contracts.errors import (
    BackendError,
    ConflictError,
    ForbiddenError,
    HiverError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from hiverd.files import rooted
from hiverd.files.paths import shown


class NoSpaceError(HiverError):
    """The sandbox's disk is full (RFC 4918, 507 Insufficient Storage)."""

    status: ClassVar[int] = 507


_BY_ERRNO: Final[dict[int, tuple[type[HiverError], str]]] = {
    errno.ENOENT: (NotFoundError, "no such file or directory"),
    errno.ENOTDIR: (InvalidError, "a parent is not a directory"),
    errno.ELOOP: (InvalidError, "too many levels of symbolic links, or a link the server does not follow"),
    errno.ENAMETOOLONG: (InvalidError, "name is too long"),
    errno.EISDIR: (InvalidError, "is a directory"),
    errno.EINVAL: (InvalidError, "the file system does not accept this"),
    errno.EILSEQ: (InvalidError, "the file system does not accept this name"),
    errno.EXDEV: (InvalidError, "leads out of the sandbox"),
    errno.ENOTEMPTY: (InvalidError, "directory not empty"),
    errno.EEXIST: (InvalidError, "directory not empty"),
    errno.EFBIG: (InvalidError, "file is too large"),
    errno.EBUSY: (ConflictError, "is in use as a mount point"),
    errno.EAGAIN: (ConflictError, "is locked by a process of the sandbox, or its path keeps changing"),
    errno.ETXTBSY: (ConflictError, "is being executed"),
    errno.EACCES: (ForbiddenError, "permission denied"),
    errno.EPERM: (ForbiddenError, "operation not permitted"),
    errno.EROFS: (ForbiddenError, "read-only file system"),
    errno.ENOSPC: (NoSpaceError, "no space left on the sandbox's disk"),
    errno.EDQUOT: (NoSpaceError, "disk quota exceeded"),
    errno.ENOTCONN: (UnavailableError, "the file system is not connected"),
    errno.ESTALE: (UnavailableError, "the file system is gone"),
    errno.ETIMEDOUT: (UnavailableError, "the file system does not answer"),
    errno.ESHUTDOWN: (UnavailableError, "the file system is shut down"),
}


def failure(error: OSError, path: bytes, *, reading: bool = False) -> HiverError:
    """The typed error for an OSError about `path`.

    For reading, a directory or special file in the file's place is "not found", as the API's text has it.
    """
    name = shown(path)
    if isinstance(error, rooted.NotRegularError):
        kind = NotFoundError if reading else InvalidError
        return kind(f"{name}: {error.strerror}")
    if reading and error.errno == errno.ENOTDIR:
        return NotFoundError(f"{name}: no such file or directory")
    found = _BY_ERRNO.get(error.errno or 0)
    if found is None:
        return BackendError(f"{name}: {error.strerror or 'input/output error'}")
    return found[0](f"{name}: {found[1]}")
