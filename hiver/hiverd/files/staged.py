"""A file that is being received: invisible until it is whole, then at its place in one step (PROTOCOL 3.10)."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from hiverd.files import linux, rooted
from hiverd.files.direct import Incoming, Pipe, Progress

STAGED_PREFIX: Final = b".hiver-upload-"
"""Of names that files have while they arrive. Where rules withhold anything, nobody but the server sees such names."""
_NO_TMPFILE: Final = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT, errno.ENOSYS})
_COPY_BYTES: Final = 1 << 30
_NEW_FILE_MODE: Final = 0o644


class StagedFile:
    """Created by `stage`. Every method blocks. For one caller at a time; `close` without `commit` leaves nothing."""

    def __init__(self, target: rooted.Target, fd: int, temporary: bytes | None, ids: tuple[int, int]) -> None:
        self._target = target
        self._fd = fd
        self._temporary = temporary
        self._ids = ids
        self._closed = False
        self.size = 0
        """Bytes written so far."""

    def write(self, pieces: Sequence[bytes]) -> None:
        """Appends all pieces."""
        for start in range(0, len(pieces), 1000):  # IOV_MAX is 1024
            batch = pieces[start : start + 1000]
            wanted = sum(map(len, batch))
            written = os.writev(self._fd, batch)
            self.size += written
            if written < wanted:
                self._write_rest(b"".join(batch), written)

    def take(self, incoming: Incoming, socket_fd: int, pipe: Pipe) -> Progress:
        """Appends what has arrived of a body that is still in its socket."""
        before = incoming.remaining
        try:
            return incoming.take(socket_fd, pipe, self._fd)
        finally:
            self.size += before - incoming.remaining

    def _write_rest(self, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while offset < len(view):
            written = os.write(self._fd, view[offset:])
            self.size += written
            offset += written

    def commit(self) -> None:
        """Gives the file its mode and its name, replacing what was there."""
        if self._target.mounted:
            self._overwrite()
            return
        with linux.creating_as(*self._ids):
            self._take_over_attributes()
            if self._temporary is None and self._target.existing is None and self._link(self._target.name):
                return
            while self._temporary is None:
                name = _temporary_name()
                if self._link(name):
                    self._temporary = name
            self._rename()

    def finish(self) -> None:
        """`commit`, then `close` whatever came of it."""
        try:
            self.commit()
        finally:
            self.close()

    def close(self) -> None:
        """Frees descriptors, and removes the temporary name if `commit` did not succeed. Idempotent."""
        if self._closed:
            return
        self._closed = True
        os.close(self._fd)
        if self._temporary is not None:
            with suppress(OSError):
                os.unlink(self._temporary, dir_fd=self._target.parent_fd)
        os.close(self._target.parent_fd)

    def _take_over_attributes(self) -> None:
        existing = self._target.existing
        if existing is None:
            os.fchmod(self._fd, _NEW_FILE_MODE)
            return
        # Writing to a file clears set-user-id, so a replacement does not have it either.
        if (existing.st_uid, existing.st_gid) != self._ids:
            with suppress(OSError):
                os.fchown(self._fd, existing.st_uid, existing.st_gid)
        os.fchmod(self._fd, stat.S_IMODE(existing.st_mode) & 0o1777)

    def _link(self, name: bytes) -> bool:
        try:
            os.link(f"/proc/self/fd/{self._fd}", name, dst_dir_fd=self._target.parent_fd)
        except FileExistsError:
            return False
        return True

    def _rename(self) -> None:
        assert self._temporary is not None  # noqa: S101 -- commit made one
        parent_fd = self._target.parent_fd
        os.rename(self._temporary, self._target.name, src_dir_fd=parent_fd, dst_dir_fd=parent_fd)
        self._temporary = None

    def _overwrite(self) -> None:
        """For a file that is itself a mount (`/etc/hosts` often is) and cannot be replaced by name."""
        out = _open_mounted(self._target)
        source = rooted.reopen(self._fd, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while os.sendfile(out, source, None, _COPY_BYTES):
                pass
        finally:
            os.close(source)
            os.close(out)


def stage(root_fd: int, path: bytes, ids: tuple[int, int]) -> StagedFile:
    """Begins to receive the file for a clean `path` that is not `/`, making its parents. `ids` own what is made.

    Raises OSError and `rooted.NotRegularError`; then nothing is left but parents that were made.
    """
    with linux.creating_as(*ids):
        target = rooted.locate_target(root_fd, path)
        try:
            fd, temporary = _open_temporary(target.parent_fd)
        except BaseException:
            os.close(target.parent_fd)
            raise
    return StagedFile(target, fd, temporary, ids)


def _open_mounted(target: rooted.Target) -> int:
    """A descriptor for writing to a regular file that is a mount of its own; it is empty then."""
    found = os.open(target.name, rooted.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=target.parent_fd)
    try:
        rooted.refuse_pseudo(found)
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise rooted.NotRegularError(errno.EINVAL, "is not a regular file")
        return rooted.reopen(found, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    finally:
        os.close(found)


def _temporary_name() -> bytes:
    return STAGED_PREFIX + secrets.token_hex(12).encode()


def _open_temporary(parent_fd: int) -> tuple[int, bytes | None]:
    """A file without a name where the file system can do that, otherwise one with a random name."""
    try:
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=parent_fd), None
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise
    name = _temporary_name()
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, 0o600, dir_fd=parent_fd), name
