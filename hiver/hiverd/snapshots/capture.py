"""A capture: what lies in some folders of the host becomes an archive of a sandbox's files. Blocking.

A first pass reads everything while the workload may run. A later one compares, takes what has changed and forgets what
has gone; the last one does so while nothing runs, and is short because little is left to do. Every path is hostile: it
is resolved below its part's folder, and no link is followed.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Final

from msgspec import Struct

from hiverd.files import linux
from hiverd.snapshots import members
from hiverd.snapshots.attributes import Ids, attributes_of, inner_xattrs
from hiverd.snapshots.contents import add_file
from hiverd.snapshots.members import Attributes
from hiverd.snapshots.selection import Selection
from hiverd.snapshots.spool import Span, Spool

MAX_NAME_BYTES: Final = 4095
"""Longer names cannot be used by any program without effort (PATH_MAX)."""
_RACY_NS: Final = 20_000_000
"""A change so soon after another one may leave the change time as it is: such a file is read once more."""
_BELOW: Final = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_MAGICLINKS | linux.RESOLVE_NO_SYMLINKS
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_VANISHED: Final = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO}
"""Gone or replaced meanwhile, or not for the sandbox's eyes."""
_OPAQUE: Final = "trusted.overlay.opaque"
_ALWAYS_CHANGED: Final = (0, -1, 0, 0)

Mark = tuple[int, int, int, int]
"""Inode, size, modification time, change time: equal as long as nothing has happened to a file."""


class Part(Struct, frozen=True):
    """A folder of the host that is part of what the sandbox sees."""

    place: str
    """Where it is in the sandbox, without a leading slash; empty for the root."""
    folder: str
    overlay: bool = False
    """It is the upper folder of an overlay: it marks deletions (overlayfs, "whiteouts and opaque directories")."""
    first_id: int = 0
    id_count: int = 1 << 32
    covered: tuple[str, ...] = ()
    """Places at which something else is mounted: not looked into."""


class Counts(Struct):
    members: int = 0
    left_out: int = 0
    """Sockets, devices, and what cannot be named or read."""


class TooManyMembersError(Exception):
    """The sandbox has more files than an archive may hold."""


class _Folder(Struct, frozen=True):
    name: bytes
    attributes: Attributes
    deleted: tuple[bytes, ...]
    opaque: bool


class _Open(Struct, frozen=True):
    """A part while it is walked through."""

    descriptor: int
    part: Part
    place: bytes
    ids: Ids
    covered: frozenset[bytes]


class _Visit(Struct):
    """A folder that is being looked into."""

    fd: int
    name: bytes
    pending: list[bytes]
    """Folders that come after it."""
    only: str | None = None
    """The one entry that is asked for."""
    is_base: bool = False


class Changes(Struct, frozen=True):
    """Between two passes."""

    changed: list[tuple[int, bytes]]
    """(number of the part, name)"""
    gone: set[bytes]
    bytes: int


class Capture:
    """One capture, pass after pass. `close` frees what it holds."""

    def __init__(self, parts: list[Part], selection: Selection, spool: Spool, max_members: int) -> None:
        """Raises `OSError` if a part's folder cannot be opened."""
        self._selection = selection
        self._spool = spool
        self._max_members = max_members
        self._known: dict[bytes, Mark] = {}
        self._folders: list[_Folder] = []
        self._links: dict[tuple[int, int], tuple[bytes, bool]] = {}
        self._stale: list[tuple[set[bytes], int]] = []
        self._parts: list[_Open] = []
        self.counts = Counts()
        for part in parts:
            descriptor = os.open(part.folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            covered = frozenset(os.fsencode(place) for place in part.covered)
            ids = Ids(part.first_id, part.id_count)
            self._parts.append(_Open(descriptor, part, os.fsencode(part.place), ids, covered))

    def close(self) -> None:
        for part in self._parts:
            os.close(part.descriptor)
        self._parts.clear()
        self._spool.close()

    # -- passes -----------------------------------------------------------------------------------------------------

    def read_all(self) -> None:
        """The first pass."""
        for part in self._parts:
            for visit in self._walk(part):
                for entry, name in self._entries(part, visit):
                    self._read(part, visit.fd, entry.name, name)

    def compare(self, suspects: AbstractSet[int] = frozenset()) -> Changes:
        """What has changed since the passes before. Quick: it opens folders and no files.

        `suspects`: numbers of inodes that may have changed though their times are as they were.
        """
        changed: list[tuple[int, bytes]] = []
        known, total = self._known, 0
        seen: set[bytes] = set()
        self._folders = []
        self.counts.left_out = 0
        for number, part in enumerate(self._parts):
            for visit in self._walk(part):
                for entry, name in self._entries(part, visit):
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    seen.add(name)
                    mark = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
                    if (known.get(name) != mark or status.st_ino in suspects) and self._is_ours(status):
                        changed.append((number, name))
                        total += status.st_size
        return Changes(changed, known.keys() - seen, total)

    def take(self, changes: Changes) -> None:
        """Reads what `compare` has found."""
        names = {name for _, name in changes.changed}
        self._stale.append((changes.gone | names.intersection(self._known), self._spool.next_generation()))
        for name in changes.gone | names:
            self._known.pop(name, None)
        self._links.clear()  # a new link changes the inode's change time: all of its names are among the changed ones
        for number, name in changes.changed:
            self._read_again(self._parts[number], name)

    def finish(self) -> list[Span]:
        """The archive as parts of the spool's file. The workload may run by now."""
        for stale, generation in self._stale:
            self._spool.drop(stale, generation)
        self._spool.settle()
        self.counts.members = len(self._known) + len(self._folders)
        # Marks of deletion come before everything, since they are about what was there before. The rest about folders
        # comes last, the inner ones first: what is put into a folder changes its times, and may need rights on it.
        head = b"".join(_folder_member(each) for each in self._folders if each.deleted or each.opaque)
        inner_first = sorted(self._folders, key=lambda each: each.name, reverse=True)
        tail = b"".join(_folder_member(each, marks=False) for each in inner_first if each.name)
        return self._spool.finished(head, tail + members.END)

    # -- walking ----------------------------------------------------------------------------------------------------

    def _walk(self, part: _Open) -> Iterator[_Visit]:
        """Every folder of a part that is to be looked into; its descriptor is closed when the next one comes."""
        for base in self._selection.bases:
            start = _start_in(part.place, base)
            if start is None or self._selection.below_excluded(start):
                continue
            first: _Visit | None = self._first_visit(part, start)
            pending: list[bytes] = []
            while first is not None or pending:
                visit = first or self._visit(part, pending.pop(), pending)
                first = None
                if visit is None:
                    continue
                pending = visit.pending
                try:
                    yield visit
                finally:
                    os.close(visit.fd)

    def _first_visit(self, part: _Open, start: bytes) -> _Visit | None:
        """A base that is no folder is looked at in the folder that it is in."""
        try:
            return _Visit(_open_folder(part, start), start, [], is_base=True)
        except OSError as error:
            if error.errno not in _VANISHED:
                raise
        folder, _, only = start.rpartition(b"/")
        if start == part.place or not only:
            return None
        try:
            return _Visit(_open_folder(part, folder), folder, [], only=os.fsdecode(only))
        except OSError as error:
            if error.errno not in _VANISHED:
                raise
            return None

    def _visit(self, part: _Open, name: bytes, pending: list[bytes]) -> _Visit | None:
        try:
            return _Visit(_open_folder(part, name), name, pending)
        except OSError as error:
            if error.errno not in _VANISHED | {errno.ENAMETOOLONG}:
                raise
            self.counts.left_out += 1
            return None

    def _entries(self, part: _Open, visit: _Visit) -> Iterator[tuple[os.DirEntry[str], bytes]]:
        """What is in a folder besides folders, which are noted for later."""
        prefix = visit.name + b"/" if visit.name else b""
        deleted: list[bytes] = []
        selection, plain, encode = self._selection, self._selection.is_plain, os.fsencode
        overlay = part.part.overlay
        with os.scandir(visit.fd) as entries:
            for entry in entries:
                name = prefix + encode(entry.name)
                if selection.is_excluded(name) or (visit.only is not None and entry.name != visit.only):
                    continue
                if len(name) > MAX_NAME_BYTES:
                    self.counts.left_out += 1
                elif entry.is_dir(follow_symlinks=False):
                    self._folder_entry(part, visit, entry.name, name)
                elif plain or selection.selects(name):
                    if overlay and _is_whiteout(entry):
                        deleted.append(encode(entry.name))
                    else:
                        yield entry, name
        if deleted or (visit.only is None and (plain or not visit.name or selection.selects(visit.name))):
            self._note_folder(part, visit, deleted)

    def _folder_entry(self, part: _Open, visit: _Visit, entry: str, name: bytes) -> None:
        if name not in part.covered:
            visit.pending.append(name)
        elif self._selection.selects(name):
            status = os.stat(entry, dir_fd=visit.fd, follow_symlinks=False)
            self._folders.append(_Folder(name, attributes_of(status, part.ids, {}), (), opaque=False))

    def _note_folder(self, part: _Open, visit: _Visit, deleted: list[bytes]) -> None:
        attributes = attributes_of(os.fstat(visit.fd), part.ids, inner_xattrs(visit.fd, part.ids))
        opaque = part.part.overlay and visit.only is None and _is_opaque(visit.fd)
        if visit.is_base and part.part.overlay and not opaque:
            opaque = _is_below_opaque(part, visit.name)
        self._folders.append(_Folder(visit.name, attributes, tuple(deleted), opaque))

    def _is_ours(self, status: os.stat_result) -> bool:
        """Whether such a thing can be in an archive."""
        kind = stat.S_IFMT(status.st_mode)
        if kind in {stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO}:
            return True
        self.counts.left_out += 1
        return False

    # -- reading ----------------------------------------------------------------------------------------------------

    def _read_again(self, part: _Open, name: bytes) -> None:
        folder, _, last = name.rpartition(b"/")
        try:
            fd = _open_folder(part, folder)
        except OSError as error:
            if error.errno not in _VANISHED:
                raise
            return
        try:
            self._read(part, fd, os.fsdecode(last), name)
        finally:
            os.close(fd)

    def _read(self, part: _Open, fd: int, entry: str, name: bytes) -> None:
        """Adds one member. What vanishes meanwhile is not there."""
        if len(self._known) >= self._max_members:
            raise TooManyMembersError
        try:
            # Not opened to find out: that would wake whoever waits at a FIFO, and devices may do anything.
            if not stat.S_ISREG(os.stat(entry, dir_fd=fd, follow_symlinks=False).st_mode):
                self._read_special(part, fd, entry, name)
                return
            file = os.open(entry, _FILE, dir_fd=fd)
        except OSError as error:
            if error.errno not in _VANISHED:
                raise
            self._read_special(part, fd, entry, name)
            return
        try:
            status = os.fstat(file)
            if stat.S_ISREG(status.st_mode):
                self._read_file(part, file, status, name)
            else:
                self._read_special(part, fd, entry, name)
        finally:
            os.close(file)

    def _read_file(self, part: _Open, file: int, status: os.stat_result, name: bytes) -> None:
        racy = status.st_ctime_ns > time.time_ns() - _RACY_NS
        inode = (status.st_dev, status.st_ino)
        first = self._links.get(inode) if status.st_nlink > 1 else None
        if first is not None:
            attributes = attributes_of(status, part.ids, {})
            self._spool.member(name, members.header(name, members.HARD_LINK, attributes, link=first[0]))
            racy = racy or first[1]
        else:
            attributes = attributes_of(status, part.ids, inner_xattrs(file, part.ids))
            add_file(self._spool, name, file, status, attributes)
            if status.st_nlink > 1:
                self._links[inode] = (name, racy)
        self._known[name] = _ALWAYS_CHANGED if racy else _mark(status)

    def _read_special(self, part: _Open, fd: int, entry: str, name: bytes) -> None:
        try:
            status = os.stat(entry, dir_fd=fd, follow_symlinks=False)
            link = os.fsencode(os.readlink(entry, dir_fd=fd)) if stat.S_ISLNK(status.st_mode) else b""
        except OSError as error:
            if error.errno not in _VANISHED | {errno.EINVAL}:
                raise
            return
        if not self._is_ours(status):
            return
        if stat.S_ISREG(status.st_mode):  # it cannot be opened
            self.counts.left_out += 1
            return
        kind = members.SYMLINK if stat.S_ISLNK(status.st_mode) else members.FIFO
        attributes = attributes_of(status, part.ids, {})
        self._spool.member(name, members.header(name, kind, attributes, link=link))
        self._known[name] = _mark(status)


def _mark(status: os.stat_result) -> Mark:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _open_folder(part: _Open, name: bytes) -> int:
    return linux.openat2(part.descriptor, name[len(part.place) :].lstrip(b"/") or b".", _FOLDER, _BELOW)


def _is_below_opaque(part: _Open, name: bytes) -> bool:
    """Whether the image's folder of that name is hidden by one further up."""
    while name:
        name = name.rpartition(b"/")[0]
        try:
            fd = _open_folder(part, name)
        except OSError:
            continue
        try:
            if _is_opaque(fd):
                return True
        finally:
            os.close(fd)
    return False


def _start_in(place: bytes, base: bytes) -> bytes | None:
    """Where a walk for `base` begins in a part at `place`; None: it has nothing of it."""
    if not base or base == place or place.startswith(base + b"/"):
        return place
    if not place or base.startswith(place + b"/"):
        return base
    return None


def _is_whiteout(entry: os.DirEntry[str]) -> bool:
    if entry.is_file(follow_symlinks=False) or entry.is_symlink():
        return False
    status = entry.stat(follow_symlinks=False)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _is_opaque(fd: int) -> bool:
    try:
        return os.getxattr(fd, _OPAQUE) == b"y"
    except OSError:
        return False


def _folder_member(folder: _Folder, *, marks: bool = True) -> bytes:
    attributes = folder.attributes
    if marks:
        told = {**attributes.xattrs}
        if folder.opaque:
            told[members.OPAQUE] = b"y"
        if folder.deleted:
            told[members.DELETED] = members.deleted_names(folder.deleted)
        attributes = attributes._replace(xattrs=told, mode=attributes.mode | 0o700)
    return members.header((folder.name or b".") + b"/", members.DIRECTORY, attributes)
