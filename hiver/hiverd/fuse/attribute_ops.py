"""Attributes of files, directories and the file system (fuse.h)."""

from __future__ import annotations

import errno
import os
from typing import Final, NamedTuple

from hiverd.fuse import abi
from hiverd.fuse.caller import Caller
from hiverd.fuse.core import Answer, Core
from hiverd.fuse.file_ops import FileOperations
from hiverd.fuse.nodes import Node

_NANOSECONDS: Final = 1_000_000_000
_TIMES: Final = abi.FATTR_ATIME | abi.FATTR_MTIME
_NOW: Final = abi.FATTR_ATIME_NOW | abi.FATTR_MTIME_NOW


class _Change(NamedTuple):
    """`fuse_setattr_in`; a member counts if its bit in `valid` is set."""

    valid: int
    handle: int
    size: int
    atime_ns: int
    mtime_ns: int
    mode: int
    uid: int
    gid: int

    @classmethod
    def of(cls, body: memoryview) -> _Change:
        (valid, _, handle, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _) = (
            abi.SETATTR_IN.unpack_from(body)
        )
        return cls(
            valid, handle, size, atime * _NANOSECONDS + atime_ns, mtime * _NANOSECONDS + mtime_ns, mode, uid, gid
        )


class AttributeOperations:
    def __init__(self, core: Core, files: FileOperations) -> None:
        self._core = core
        self._files = files

    def get(self, caller: Caller, number: int, body: memoryview) -> Answer:
        flags, _, handle = abi.GETATTR_IN.unpack_from(body)
        core = self._core
        node = core.tree.node(number)
        cached = True
        if node.access == "deny" and node.parent is not None:
            # The mount's own directory has attributes even if it is denied: it could not be mounted otherwise.
            cached = not core.judge.must_see(caller, node.access, core.tree.path_of(node))
        fd = self._files.handle(handle).fd if flags & abi.GETATTR_FH else None
        return core.attributes.attributes(
            core.status_of(node, caller, fd), cached=cached, links=0 if node.gone and not node.handles else None
        )

    def set(self, caller: Caller, number: int, body: memoryview) -> Answer:
        change = _Change.of(body)
        core = self._core
        node = core.tree.node(number)
        owners = core.attributes.owners
        cached = True
        if node.parent is not None or owners.keeps_chown or change.valid & ~(abi.FATTR_UID | abi.FATTR_GID):
            # Who owns the mount is the business of those who set it up, even if it is denied or read-only.
            told = "write" if change.valid & abi.FATTR_SIZE else None
            cached = not core.judge.must_change(caller, node.access, core.tree.path_of(node), told)  # type: ignore[arg-type]
        fd = self._files.handle(change.handle).fd if change.valid & abi.FATTR_FH else None
        self._apply(caller, node, change, fd)
        return core.attributes.attributes(core.status_of(node, caller, fd), cached=cached)

    def _apply(self, caller: Caller, node: Node, change: _Change, fd: int | None) -> None:
        valid = change.valid
        if valid & (abi.FATTR_UID | abi.FATTR_GID):
            self._give(caller, node, change, fd)
        if valid & abi.FATTR_SIZE:
            self._resize(caller, node, change, fd)
        if valid & abi.FATTR_MODE:
            self._with_path(caller, node, fd, lambda path: os.chmod(path, change.mode & 0o7777))
        if valid & _TIMES:
            self._touch(caller, node, change, fd)

    def _give(self, caller: Caller, node: Node, change: _Change, fd: int | None) -> None:
        uid = change.uid if change.valid & abi.FATTR_UID else None
        gid = change.gid if change.valid & abi.FATTR_GID else None
        owners = self._core.attributes.owners
        if owners.keeps_chown:
            self._with_path(
                caller, node, fd, lambda path: os.chown(path, -1 if uid is None else uid, -1 if gid is None else gid)
            )
        elif node.parent is None:
            owners.give_root(uid, gid)

    def _resize(self, caller: Caller, node: Node, change: _Change, fd: int | None) -> None:
        content = self._core.content
        if content is None or node.gone:
            self._truncate(caller, node, change.size, fd)
            return
        path = self._core.tree.path_of(node)
        if fd is not None:
            content.modify(path)
            self._truncate(caller, node, change.size, fd)
            self._files.handle(fd).written = True
            return
        content.open(path, write=True, truncate=change.size == 0)
        try:
            content.modify(path)
            self._truncate(caller, node, change.size, None)
        finally:
            content.close(path, written=True)

    def _truncate(self, caller: Caller, node: Node, size: int, fd: int | None) -> None:
        if fd is not None:
            os.ftruncate(fd, size)
            return
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        own = self._open(caller, node, flags)
        try:
            os.ftruncate(own, size)
        finally:
            os.close(own)

    def _touch(self, caller: Caller, node: Node, change: _Change, fd: int | None) -> None:
        valid = change.valid
        at = self._any_fd(node, fd)
        if valid & _NOW == _NOW:
            times = None
        else:
            status = None if valid & _TIMES == _TIMES else self._core.status_of(node, caller, at)
            atime_ns = change.atime_ns if status is None or valid & abi.FATTR_ATIME else status.st_atime_ns
            mtime_ns = change.mtime_ns if status is None or valid & abi.FATTR_MTIME else status.st_mtime_ns
            times = (atime_ns, mtime_ns)
        if at is not None:
            os.utime(at, ns=times) if times else os.utime(at)
            return
        if node.parent is None or node.gone:
            self._with_path(caller, node, None, lambda path: os.utime(path, ns=times) if times else os.utime(path))
            return
        folder_fd = self._core.directories.fd(node.parent, caller)
        if times:
            os.utime(node.name, ns=times, dir_fd=folder_fd, follow_symlinks=False)
        else:
            os.utime(node.name, dir_fd=folder_fd, follow_symlinks=False)

    def _with_path(self, caller: Caller, node: Node, fd: int | None, change: object) -> None:
        """Calls `change` with something that names just this object, whatever happens to its name meanwhile."""
        at = self._any_fd(node, fd)
        if at is not None:
            change(at)  # type: ignore[operator]
            return
        own = self._open(caller, node, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            change(f"/proc/self/fd/{own}")  # type: ignore[operator]
        finally:
            os.close(own)

    @staticmethod
    def _any_fd(node: Node, fd: int | None) -> int | None:
        if fd is not None or node.is_directory:
            return fd
        return next(iter(node.handles), None)

    def _open(self, caller: Caller, node: Node, flags: int) -> int:
        if node.parent is None or node.gone:
            return os.open(f"/proc/self/fd/{self._last_fd(caller, node)}", flags & ~os.O_NOFOLLOW)
        return os.open(node.name, flags, dir_fd=self._core.directories.fd(node.parent, caller))

    def _last_fd(self, caller: Caller, node: Node) -> int:
        if node.handles:
            return node.handles[-1]
        if node.is_directory:
            return self._core.directories.fd(node, caller)
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    def statfs(self, caller: Caller, number: int, body: memoryview) -> Answer:
        status = os.fstatvfs(self._core.directories.root_fd)
        return abi.STATFS_OUT.pack(
            status.f_blocks, status.f_bfree, status.f_bavail, status.f_files, status.f_ffree,
            status.f_bsize, status.f_namemax, status.f_frsize,
        )  # fmt: skip
