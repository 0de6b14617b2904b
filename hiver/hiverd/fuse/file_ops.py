"""Operations on open files: making, opening, reading, writing (fuse.h)."""

from __future__ import annotations

import errno
import os
import stat
from time import perf_counter
from typing import Final

from hiverd.fuse import abi, syscalls
from hiverd.fuse.caller import Caller
from hiverd.fuse.core import NOTHING, Answer, Core, Handle
from hiverd.fuse.descriptors import inode_of
from hiverd.fuse.nodes import Node

_KEPT_FLAGS: Final = os.O_ACCMODE | os.O_TRUNC | os.O_NOATIME | os.O_SYNC | os.O_DSYNC
"""What an open of the folder's file takes over. Not O_APPEND, which each write says itself (pages of mappings go to
their place all the same), and not O_DIRECT, which is between the kernel and the caller."""
_OWN_FLAGS: Final = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
MAX_COPY_BYTES: Final = 16 << 20
"""Of one COPY_FILE_RANGE; the caller goes on from there."""


class FileOperations:
    def __init__(self, core: Core) -> None:
        self._core = core
        self._tree = core.tree
        self._judge = core.judge
        self._content = core.content
        self._handles: dict[int, Handle] = {}

    def handle(self, number: int) -> Handle:
        try:
            return self._handles[number]
        except KeyError:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None

    def create(self, caller: Caller, number: int, body: memoryview) -> Answer:
        flags, mode, _umask, _ = abi.CREATE_IN.unpack_from(body)
        core, judge = self._core, self._judge
        place = core.place(number, body[abi.CREATE_IN.size : -1].tobytes())
        path = core.path(place)
        exempt = judge.must_change(caller, place.access, path, "write", denied=errno.EROFS)
        caller.create_as(*core.attributes.owners.creator(caller.uid, caller.gid))
        folder_fd = core.folder_fd(place, caller)
        fd = self._create(place.name, folder_fd, path, flags, mode)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
            entry = core.entry(place, status, cached=not exempt)
        except BaseException:
            os.close(fd)
            raise
        node = place.parent.children[place.name]
        exempt = exempt or (judge.record is not None and judge.is_exempt(caller))
        return entry + self._opened(fd, node, flags, exempt=exempt, keep=True)

    def _create(self, name: bytes, folder_fd: int, path: str, flags: int, mode: int) -> int:
        opening = flags & (_KEPT_FLAGS | os.O_EXCL) | _OWN_FLAGS | os.O_CREAT
        if self._content is None:
            return os.open(name, opening, mode & 0o7777, dir_fd=folder_fd)
        try:
            fd = os.open(name, opening | os.O_EXCL, mode & 0o7777, dir_fd=folder_fd)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            self._open_content(path, flags)
            return os.open(name, opening, mode & 0o7777, dir_fd=folder_fd)
        try:
            self._content.created(path)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def open(self, caller: Caller, number: int, body: memoryview) -> Answer:
        flags, _ = abi.OPEN_IN.unpack_from(body)
        core, judge = self._core, self._judge
        node = self._tree.node(number)
        changes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_TRUNC))
        if node.access == "rw":
            exempt = judge.record is not None and judge.is_exempt(caller)
        elif changes:
            exempt = judge.must_change(caller, node.access, self._tree.path_of(node), "write")
        else:
            exempt = judge.must_see(caller, node.access, self._tree.path_of(node)) or judge.is_exempt(caller)
        keep = core.attributes.caching.keep_pages
        if self._content is not None and not node.gone:
            keep = self._open_content(self._tree.path_of(node), flags)
        fd = self._open(node, flags, caller)
        if not core.attributes.caching.keep_pages and self._content is None:
            keep = self._looks_as_before(fd, node)
        return self._opened(fd, node, flags, exempt=exempt, keep=keep)

    def _open_content(self, path: str, flags: int) -> bool:
        assert self._content is not None  # noqa: S101 -- for the type checker; the caller asked
        truncate = bool(flags & os.O_TRUNC)
        keep = self._content.open(path, write=bool(flags & (os.O_WRONLY | os.O_RDWR)) or truncate, truncate=truncate)
        if truncate:
            self._content.modify(path)
        return keep

    def _open(self, node: Node, flags: int, caller: Caller) -> int:
        opening = flags & _KEPT_FLAGS | _OWN_FLAGS
        if node.gone or node.parent is None:
            if not node.handles:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            # Through /proc/self/fd of a process of the sandbox, say: the file has no name any more.
            return os.open(f"/proc/self/fd/{node.handles[-1]}", opening & ~os.O_NOFOLLOW)
        return os.open(node.name, opening, dir_fd=self._core.directories.fd(node.parent, caller))

    @staticmethod
    def _looks_as_before(fd: int, node: Node) -> bool:
        """Closes what is not the file that the kernel found. True: the pages that it has are those of the file."""
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or inode_of(status) != node.inode:
            os.close(fd)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        seen = (status.st_mtime_ns, status.st_size)
        same, node.seen = node.seen == seen, seen
        return same

    def _opened(self, fd: int, node: Node, flags: int, *, exempt: bool, keep: bool) -> bytes:
        handle = Handle(fd, node, writes=bool(flags & (os.O_WRONLY | os.O_RDWR)), exempt=exempt)
        if flags & os.O_TRUNC:
            handle.written = True
        self._handles[fd] = handle
        node.handles.append(fd)
        opened = abi.FOPEN_KEEP_CACHE if keep else 0
        if exempt and node.access != "rw":
            # Pages would be there for those who have it open from before it was denied; and what old mappings of what
            # is read-only now have changed in theirs is not the file.
            opened = abi.FOPEN_DIRECT_IO
        return abi.OPEN_OUT.pack(fd, opened, 0)

    def release(self, caller: Caller, number: int, body: memoryview) -> Answer:
        fd = abi.RELEASE_IN.unpack_from(body)[0]
        handle = self._handles.pop(fd, None)
        if handle is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        node = handle.node
        node.handles.remove(fd)
        try:
            if self._content is not None and not node.gone:
                self._content.close(self._tree.path_of(node), written=handle.written)
        finally:
            os.close(fd)
        return NOTHING

    def _may_read(self, handle: Handle) -> Node:
        node = handle.node
        if node.epoch != self._tree.epoch:
            self._tree.fresh(node)
        if node.access == "deny" and not handle.exempt:
            raise self._judge.refuse(self._tree.path_of(node), "read", errno.ENOENT)
        return node

    def _may_write(self, handle: Handle, *, exempt: bool) -> Node:
        node = handle.node
        if node.epoch != self._tree.epoch:
            self._tree.fresh(node)
        if node.access != "rw" and not exempt:
            raise self._judge.refuse(self._tree.path_of(node), "write", errno.EROFS)
        return node

    def read(self, caller: Caller, number: int, body: memoryview) -> Answer:
        fd, offset, size, _, _, _, _ = abi.READ_IN.unpack_from(body)
        handle = self.handle(fd)
        node = self._may_read(handle)
        tells = self._judge.record is not None and not handle.exempt
        began = perf_counter()
        try:
            if self._content is not None and not node.gone:
                self._content.read(self._tree.path_of(node), offset, size)
            count = os.preadv(fd, (caller.space[:size],), offset)
        except OSError as error:
            if tells:
                self._judge.record_allowed(self._tree.path_of(node), "read", began, error)
            raise
        if tells:
            self._judge.record_allowed(self._tree.path_of(node), "read", began)
        return caller.space[:count]

    def write(self, caller: Caller, number: int, body: memoryview) -> Answer:
        fd, offset, size, write_flags, _, flags, _ = abi.WRITE_IN.unpack_from(body)
        handle = self.handle(fd)
        # Pages of a mapping come with any handle, so that handle says nothing about who wrote them.
        exempt = handle.exempt and not write_flags & abi.WRITE_CACHE
        try:
            node = self._may_write(handle, exempt=exempt)
        except OSError:
            if write_flags & abi.WRITE_CACHE:
                # Others would go on seeing what was not written.
                self._core.pages_refused(handle.node)
            raise
        data = body[abi.WRITE_IN.size : abi.WRITE_IN.size + size]
        appends = flags & os.O_APPEND and not write_flags & abi.WRITE_CACHE
        began = perf_counter()
        handle.written = True
        try:
            if self._content is not None and not node.gone:
                self._content.modify(self._tree.path_of(node))
            count = os.pwritev(fd, (data,), 0, os.RWF_APPEND) if appends else os.pwrite(fd, data, offset)
        except OSError as error:
            if not exempt:
                self._judge.record_allowed(self._tree.path_of(node), "write", began, error)
            raise
        if not exempt and self._judge.record is not None:
            self._judge.record_allowed(self._tree.path_of(node), "write", began)
        return abi.WRITE_OUT.pack(count, 0)

    def fsync(self, caller: Caller, number: int, body: memoryview) -> Answer:
        fd, flags, _ = abi.FSYNC_IN.unpack_from(body)
        self.handle(fd)
        if flags & abi.FSYNC_FDATASYNC:
            os.fdatasync(fd)
        else:
            os.fsync(fd)
        return NOTHING

    def allocate(self, caller: Caller, number: int, body: memoryview) -> Answer:
        fd, offset, length, mode, _ = abi.FALLOCATE_IN.unpack_from(body)
        handle = self.handle(fd)
        node = self._may_write(handle, exempt=handle.exempt)
        if self._content is not None and not node.gone:
            self._content.modify(self._tree.path_of(node))
        handle.written = True
        syscalls.fallocate(fd, mode, offset, length)
        return NOTHING

    def seek(self, caller: Caller, number: int, body: memoryview) -> Answer:
        fd, offset, whence, _ = abi.LSEEK_IN.unpack_from(body)
        handle = self.handle(fd)
        node = self._may_read(handle)
        if self._content is not None and not node.gone:
            # Holes of the folder's file may be what has not been fetched.
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        return abi.LSEEK_OUT.pack(os.lseek(fd, offset, whence))

    def copy_range(self, caller: Caller, number: int, body: memoryview) -> Answer:
        source_fd, source_offset, _node, target_fd, offset, length, _ = abi.COPY_FILE_RANGE_IN.unpack_from(body)
        if self._content is not None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        source, target = self.handle(source_fd), self.handle(target_fd)
        source_node = self._may_read(source)
        target_node = self._may_write(target, exempt=target.exempt)
        target.written = True
        began = perf_counter()
        size = min(length, MAX_COPY_BYTES)
        count = os.copy_file_range(source_fd, target_fd, size, source_offset, offset)
        if self._judge.record is not None and not target.exempt:
            self._judge.record_allowed(self._tree.path_of(source_node), "read", began)
            self._judge.record_allowed(self._tree.path_of(target_node), "write", began)
        return abi.WRITE_OUT.pack(count, 0)

    def close_all(self) -> None:
        """When nothing is served any more."""
        while self._handles:
            fd, handle = self._handles.popitem()
            try:
                if self._content is not None and not handle.node.gone:
                    self._content.close(self._tree.path_of(handle.node), written=handle.written)
            finally:
                os.close(fd)
