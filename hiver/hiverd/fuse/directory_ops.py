"""Reading directories (fuse.h). An open directory takes the same memory however large it is."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from time import perf_counter
from typing import Final

from hiverd.fuse import abi
from hiverd.fuse.caller import Caller
from hiverd.fuse.core import NOTHING, Answer, Core, Handle, Place
from hiverd.fuse.nodes import Node

_PADDING: Final = tuple(bytes(length) for length in range(8))
_UNKNOWN, _DIRECTORY, _REGULAR, _LINK = 0, 4, 8, 10
_NO_ENTRY: Final = bytes(abi.ENTRY_OUT.size)
"""Stands for an entry that the kernel is to look up itself."""


class _Entry:
    __slots__ = ("inode", "kind", "name")

    def __init__(self, name: bytes, inode: int, kind: int) -> None:
        self.name = name
        self.inode = inode
        self.kind = kind


class Listing(Handle):
    """An open directory: a position in it, and what was given last, as the kernel comes back to that."""

    __slots__ = ("batch", "batch_start", "entries", "position")

    def __init__(self, fd: int, node: Node, *, exempt: bool) -> None:
        super().__init__(fd, node, writes=False, exempt=exempt)
        self.entries: Iterator[_Entry] | None = None
        self.position = 0
        self.batch: list[_Entry] = []
        self.batch_start = 0

    def restart(self) -> None:
        self.close_entries()
        self.entries = _entries(self.fd)
        self.position = self.batch_start = 0
        self.batch = []

    def close_entries(self) -> None:
        if self.entries is not None:
            self.entries.close()  # type: ignore[attr-defined]
            self.entries = None

    def seek(self, offset: int) -> Iterator[_Entry]:
        """Entries from a position on; those that were given last are given again as they were."""
        if self.entries is None or offset < self.batch_start or offset > self.position:
            self.restart()
            self.batch_start = offset
            for _ in zip(range(offset), self._rest(), strict=False):
                pass
            self.batch = []
        again = self.batch[offset - self.batch_start :]
        self.batch_start, self.batch = offset, []
        for entry in again:
            self.batch.append(entry)
            yield entry
        for entry in self._rest():
            self.batch.append(entry)
            yield entry

    def _rest(self) -> Iterator[_Entry]:
        assert self.entries is not None  # noqa: S101 -- for the type checker
        for entry in self.entries:
            self.position += 1
            yield entry


def _entries(fd: int) -> Iterator[_Entry]:
    yield _Entry(b".", 1, _DIRECTORY)
    yield _Entry(b"..", 1, _DIRECTORY)
    with os.scandir(fd) as found:
        for one in found:
            yield _Entry(os.fsencode(one.name), one.inode(), _kind(one))


def _kind(entry: os.DirEntry[str]) -> int:
    if entry.is_symlink():
        return _LINK
    if entry.is_file(follow_symlinks=False):
        return _REGULAR
    return _DIRECTORY if entry.is_dir(follow_symlinks=False) else _UNKNOWN


class DirectoryOperations:
    def __init__(self, core: Core) -> None:
        self._core = core
        self._tree = core.tree
        self._judge = core.judge
        self._listings: dict[int, Listing] = {}

    def open(self, caller: Caller, number: int, body: memoryview) -> Answer:
        core, judge = self._core, self._judge
        node = self._tree.node(number)
        exempt = judge.must_see(caller, node.access, self._tree.path_of(node)) if node.access == "deny" else False
        exempt = exempt or ((judge.record is not None or not node.free) and judge.is_exempt(caller))
        if core.content is not None and not node.gone:
            core.content.list(self._tree.path_of(node))
        fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=core.directories.fd(node, caller))
        self._listings[fd] = Listing(fd, node, exempt=exempt)
        return abi.OPEN_OUT.pack(fd, 0, 0)

    def release(self, caller: Caller, number: int, body: memoryview) -> Answer:
        fd = abi.RELEASE_IN.unpack_from(body)[0]
        listing = self._listings.pop(fd, None)
        if listing is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        listing.close_entries()
        os.close(fd)
        return NOTHING

    def sync(self, caller: Caller, number: int, body: memoryview) -> Answer:
        os.fsync(self._listing(abi.FSYNC_IN.unpack_from(body)[0]).fd)
        return NOTHING

    def read(self, caller: Caller, number: int, body: memoryview) -> Answer:
        return self._read(caller, body, plus=False)

    def read_plus(self, caller: Caller, number: int, body: memoryview) -> Answer:
        return self._read(caller, body, plus=True)

    def close_all(self) -> None:
        """When nothing is served any more."""
        while self._listings:
            fd, listing = self._listings.popitem()
            listing.close_entries()
            os.close(fd)

    def _listing(self, number: int) -> Listing:
        try:
            return self._listings[number]
        except KeyError:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None

    def _read(self, caller: Caller, body: memoryview, *, plus: bool) -> bytes:
        fd, offset, size, _, _, _, _ = abi.READ_IN.unpack_from(body)
        listing = self._listing(fd)
        node = self._tree.fresh(listing.node)
        if node.access == "deny" and not listing.exempt:
            raise self._judge.refuse(self._tree.path_of(node), "read", errno.ENOENT)
        tells = offset == 0 and self._judge.record is not None and not listing.exempt
        began = perf_counter()
        try:
            page = self._page(caller, listing, offset, size, plus=plus)
        except OSError as error:
            if tells:
                self._judge.record_allowed(self._tree.path_of(node), "read", began, error)
            raise
        if tells:
            self._judge.record_allowed(self._tree.path_of(node), "read", began)
        return page

    def _page(self, caller: Caller, listing: Listing, offset: int, size: int, *, plus: bool) -> bytes:
        """As many entries as fit; empty at the end."""
        if offset == 0:
            # rewinddir(3) shows what is new.
            listing.close_entries()
        pieces: list[bytes] = []
        room = size
        head = abi.DIRENT.size + (abi.ENTRY_OUT.size if plus else 0)
        position = offset
        for entry in listing.seek(offset):
            name = entry.name
            needed = head + len(name) + -len(name) % 8
            if needed > room:
                break
            position += 1
            told = self._tell(caller, listing, name, plus=plus)
            if told is None:
                continue
            room -= needed
            pieces += (
                told,
                abi.DIRENT.pack(entry.inode, position, len(name), entry.kind),
                name,
                _PADDING[-len(name) % 8],
            )
        return b"".join(pieces)

    def _tell(self, caller: Caller, listing: Listing, name: bytes, *, plus: bool) -> bytes | None:
        """What comes before a name; None: the name is not shown."""
        if name in {b".", b".."}:
            return _NO_ENTRY if plus else NOTHING
        access = self._tree.child_access(listing.node, name)
        if access == "deny" and not listing.exempt:
            return None
        if not plus:
            return NOTHING
        if access == "deny" or listing.node.gone:
            return _NO_ENTRY
        try:
            status = os.stat(name, dir_fd=listing.fd, follow_symlinks=False)
        except OSError:
            return _NO_ENTRY
        return self._core.entry(Place(listing.node, name, access), status, cached=True)
