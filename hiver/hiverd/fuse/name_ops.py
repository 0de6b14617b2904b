"""Operations on names: looking up, making, removing, renaming (fuse.h)."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from itertools import islice
from time import perf_counter
from typing import Final

from hiverd.fuse import abi, syscalls
from hiverd.fuse.caller import Caller
from hiverd.fuse.core import NOTHING, Answer, Core, Place
from hiverd.fuse.judge import Operation
from hiverd.fuse.nodes import Node

MAX_MOVED_ENTRIES: Final = 10_000
"""How much of a directory is compared with the rules before it is renamed."""


class NameOperations:
    def __init__(self, core: Core) -> None:
        self._core = core
        self._tree = core.tree
        self._judge = core.judge
        self._content = core.content

    def lookup(self, caller: Caller, number: int, body: memoryview) -> Answer:
        core = self._core
        place = core.place(number, body[:-1].tobytes())
        cached = True
        if place.access == "deny":
            cached = not self._judge.must_see(caller, place.access, core.path(place))
        elif len(place.parent.path) > 3800:  # 255 characters below the bound
            core.path(place)
        if self._content is not None:
            self._content.look_up(core.path(place))
        try:
            status = core.status(place, caller)
        except FileNotFoundError:
            if cached and core.attributes.negative is not None:
                return core.attributes.negative
            raise
        return core.entry(place, status, cached=cached)

    def forget(self, caller: Caller, number: int, body: memoryview) -> Answer:
        self._forget(number, abi.FORGET_IN.unpack_from(body)[0])
        return None

    def batch_forget(self, caller: Caller, number: int, body: memoryview) -> Answer:
        count, _ = abi.BATCH_FORGET_IN.unpack_from(body)
        items = body[abi.BATCH_FORGET_IN.size :]
        items = items[: len(items) // abi.FORGET_ONE.size * abi.FORGET_ONE.size]
        for one, lookups in islice(abi.FORGET_ONE.iter_unpack(items), count):
            self._forget(one, lookups)
        return None

    def _forget(self, number: int, lookups: int) -> None:
        left = self._tree.forget(number, lookups)
        if left is not None and left.fd >= 0:
            self._core.directories.forgotten(left)

    def make_directory(self, caller: Caller, number: int, body: memoryview) -> Answer:
        mode, _umask = abi.MKDIR_IN.unpack_from(body)
        place = self._core.place(number, body[abi.MKDIR_IN.size : -1].tobytes())

        def make(fd: int, path: str) -> None:
            if self._content is not None:
                self._content.make_directory(path)
            os.mkdir(place.name, mode & 0o7777, dir_fd=fd)

        return self._made(caller, place, make, "write")

    def symlink(self, caller: Caller, number: int, body: memoryview) -> Answer:
        name, _, target = body[:-1].tobytes().partition(b"\0")
        place = self._core.place(number, name)

        def make(fd: int, path: str) -> None:
            if self._content is not None:
                self._content.symlink(path, os.fsdecode(target))
            os.symlink(target, place.name, dir_fd=fd)

        return self._made(caller, place, make, "write")

    def make_node(self, caller: Caller, number: int, body: memoryview) -> Answer:
        mode, _device, _umask, _ = abi.MKNOD_IN.unpack_from(body)
        place = self._core.place(number, body[abi.MKNOD_IN.size : -1].tobytes())
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        def make(fd: int, path: str) -> None:
            os.mknod(place.name, mode, dir_fd=fd)
            if self._content is not None and stat.S_ISREG(mode):
                self._content.created(path)
                self._content.close(path, written=False)

        return self._made(caller, place, make, None)

    def unlink(self, caller: Caller, number: int, body: memoryview) -> Answer:
        place = self._core.place(number, body[:-1].tobytes())

        def remove(fd: int, path: str) -> None:
            if self._content is not None:
                self._keep_open_content(place.parent.children.get(place.name), path)
                self._content.unlink(path)
            os.unlink(place.name, dir_fd=fd)

        return self._removed(caller, place, remove)

    def remove_directory(self, caller: Caller, number: int, body: memoryview) -> Answer:
        place = self._core.place(number, body[:-1].tobytes())

        def remove(fd: int, path: str) -> None:
            if self._content is not None:
                self._content.list(path)
                self._content.remove_directory(path)
            os.rmdir(place.name, dir_fd=fd)

        return self._removed(caller, place, remove)

    def link(self, caller: Caller, number: int, body: memoryview) -> Answer:
        # A file with two names would have the rights of either.
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def read_link(self, caller: Caller, number: int, body: memoryview) -> Answer:
        node = self._tree.node(number)
        self._judge.must_see(caller, node.access, self._tree.path_of(node), None)
        if node.gone or node.parent is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return os.readlink(node.name, dir_fd=self._core.directories.fd(node.parent, caller))

    def rename(self, caller: Caller, number: int, body: memoryview) -> Answer:
        (directory,) = abi.RENAME_IN.unpack_from(body)
        return self._rename(caller, number, directory, 0, body[abi.RENAME_IN.size : -1].tobytes())

    def rename2(self, caller: Caller, number: int, body: memoryview) -> Answer:
        directory, flags, _ = abi.RENAME2_IN.unpack_from(body)
        if flags & ~(syscalls.RENAME_NOREPLACE | syscalls.RENAME_EXCHANGE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return self._rename(caller, number, directory, flags, body[abi.RENAME2_IN.size : -1].tobytes())

    def _made(
        self, caller: Caller, place: Place, make: Callable[[int, str], None], operation: Operation | None
    ) -> bytes:
        core, judge = self._core, self._judge
        path = core.path(place)
        exempt = judge.must_change(caller, place.access, path, "write", denied=errno.EROFS)
        caller.create_as(*core.attributes.owners.creator(caller.uid, caller.gid))
        began = perf_counter()
        try:
            make(core.folder_fd(place, caller), path)
            status = core.status(place, caller)
        except OSError as error:
            if operation is not None:
                judge.tell(caller, path, operation, began, error)
            raise
        if operation is not None:
            judge.tell(caller, path, operation, began)
        return core.entry(place, status, cached=not exempt)

    def _removed(self, caller: Caller, place: Place, remove: Callable[[int, str], None]) -> bytes:
        core, judge = self._core, self._judge
        path = core.path(place)
        judge.must_change(caller, place.access, path, "delete")
        began = perf_counter()
        try:
            remove(core.folder_fd(place, caller), path)
        except OSError as error:
            judge.tell(caller, path, "delete", began, error)
            raise
        self._tree.removed(place.parent, place.name)
        judge.tell(caller, path, "delete", began)
        return NOTHING

    def _rename(self, caller: Caller, number: int, directory: int, flags: int, names: bytes) -> bytes:
        name, _, new_name = names.partition(b"\0")
        core, judge = self._core, self._judge
        source, target = core.place(number, name), core.place(directory, new_name)
        source_path, target_path = core.path(source), core.path(target)
        judge.must_change(caller, source.access, source_path, "delete")
        judge.must_change(caller, target.access, target_path, "write", denied=errno.EROFS)
        self._must_keep_access(caller, source, target)
        if flags & syscalls.RENAME_EXCHANGE:
            self._must_keep_access(caller, target, source)
        began = perf_counter()
        try:
            if self._content is not None:
                self._rename_content(source_path, target, target_path, flags)
            self._rename_in_folder(caller, source, target, flags)
        except OSError as error:
            judge.tell(caller, target_path, "write", began, error)
            judge.tell(caller, source_path, "delete", began, error)
            raise
        self._tree.renamed(
            source.parent, name, target.parent, new_name, exchange=bool(flags & syscalls.RENAME_EXCHANGE)
        )
        judge.tell(caller, target_path, "write", began)
        judge.tell(caller, source_path, "delete", began)
        return NOTHING

    def _rename_in_folder(self, caller: Caller, source: Place, target: Place, flags: int) -> None:
        source_fd, target_fd = self._core.folder_fd(source, caller), self._core.folder_fd(target, caller)
        if flags:
            syscalls.renameat2(source_fd, source.name, target_fd, target.name, flags)
        else:
            os.rename(source.name, target.name, src_dir_fd=source_fd, dst_dir_fd=target_fd)

    def _rename_content(self, source_path: str, target: Place, target_path: str, flags: int) -> None:
        if flags & syscalls.RENAME_EXCHANGE:
            # A backend has no such thing.
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        assert self._content is not None  # noqa: S101 -- for the type checker; the caller asked
        self._content.look_up(target_path)
        replaced = target.parent.children.get(target.name)
        if flags & syscalls.RENAME_NOREPLACE:
            if replaced is not None and not replaced.gone:
                raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        else:
            self._keep_open_content(replaced, target_path)
        self._content.rename(source_path, target_path)

    def _keep_open_content(self, node: Node | None, path: str) -> None:
        """What is open when it loses its name is wholly here from then on: nothing could be asked for it later."""
        if node is not None and node.handles and self._content is not None:
            self._content.read(path, 0, os.fstat(node.handles[-1]).st_size)

    def _must_keep_access(self, caller: Caller, source: Place, target: Place) -> None:
        """Renaming a directory must not carry anything below it to other rights, neither more nor less.

        Otherwise what is denied in `/a` could be read in `/b`, or be put where writing is denied.
        """
        rules = self._tree.rules
        source_path, target_path = self._core.path(source), self._core.path(target)
        if not rules.withholds_below(source_path) and not rules.withholds_below(target_path):
            return
        status = self._core.status(source, caller)
        if not stat.S_ISDIR(status.st_mode) or self._judge.is_exempt(caller):
            return
        if self._content is not None:
            # What is not listed yet cannot be compared.
            raise self._judge.refuse(source_path, "delete", errno.EXDEV)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(source.name, flags, dir_fd=self._core.folder_fd(source, caller))
        try:
            kept = all(
                rules.own_access(source_path + below) == rules.own_access(target_path + below)
                for below in _entries_below(fd)
            )
        finally:
            os.close(fd)
        if not kept:
            raise self._judge.refuse(source_path, "delete", errno.EXDEV)


def _entries_below(fd: int) -> list[str]:
    """All paths below a directory, as `/a/b`. `EXDEV` if there are more than can be compared."""
    found: list[str] = []
    for folder, directories, files, _fd in os.fwalk(".", dir_fd=fd, follow_symlinks=False):
        found += [f"{folder[1:]}/{name}" for name in (*directories, *files)]
        if len(found) > MAX_MOVED_ENTRIES:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    return found
