"""Putting the members of an archive below a folder, which is a sandbox's root. Blocking; runs inside the sandbox.

The archive and what lies in the sandbox are hostile. Every path is resolved below the root one step at a time, no link
on the way is followed, and nothing that other programs watch is ever opened: files are made anew.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from msgspec import Struct

from hiverd.files import linux
from hiverd.snapshots import members
from hiverd.snapshots.attributes import NOBODY
from hiverd.snapshots.members import Attributes
from hiverd.snapshots.reading import Member, TarReader
from hiverd.snapshots.selection import Selection

MAX_NAME_BYTES: Final = 4095
_MAX_PART_BYTES: Final = 255
_MAX_DEPTH: Final = 256
"""Of folders within folders that are removed: each takes a descriptor and a call."""
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_BELOW: Final = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_MAGICLINKS | linux.RESOLVE_NO_SYMLINKS
_FATAL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOTCONN}
"""Going on would leave half of the files out."""
_MAX_ID: Final = (1 << 16) - 1
_T = TypeVar("_T")


class LimitError(Exception):
    """The archive holds more than is allowed."""


class Limits(Struct, frozen=True):
    max_members: int
    max_bytes: int
    """Of all files together."""


class Outcome(Struct):
    members: int = 0
    bytes: int = 0
    refused: int = 0
    """Members that could not be put where they belong."""
    first_refusal: str = ""


class Refused(Exception):  # noqa: N818 -- of one member, not of the archive
    """This member is left out."""


class Extractor:
    def __init__(self, root: int, selection: Selection, limits: Limits) -> None:
        """`root`: a descriptor of the folder, which the caller closes."""
        self._root = root
        self._selection = selection
        self._limits = limits
        self._device = os.fstat(root).st_dev
        self._folder = b""
        self._folder_fd = os.dup(root)
        self._times: dict[bytes, int] = {}
        self._seen = 0
        self.outcome = Outcome()
        self._makers: Mapping[bytes, Callable[[Member, bytes, TarReader], None]] = {
            members.REGULAR: self._file,
            members.HARD_LINK: self._hard_link,
            members.SYMLINK: self._symlink,
            members.DIRECTORY: self._directory,
            members.FIFO: self._fifo,
        }

    def extract(self, reader: TarReader) -> None:
        """Raises `DamagedArchiveError`, `LimitError`, or `OSError` where nothing could go on."""
        for member in reader:
            self._seen += 1
            if self._seen > self._limits.max_members:
                raise LimitError(f"it has more than {self._limits.max_members} members")
            try:
                self._put(member, reader)
            except Refused as refusal:
                self._refuse(member, str(refusal))
            except OSError as error:
                if error.errno in _FATAL:
                    raise
                self._refuse(member, error.strerror or str(error))
        for name, mtime_ns in sorted(self._times.items(), reverse=True):
            self._set_folder_time(name, mtime_ns)

    def close(self) -> None:
        os.close(self._folder_fd)

    def _refuse(self, member: Member, reason: str) -> None:
        self.outcome.refused += 1
        if not self.outcome.first_refusal:
            self.outcome.first_refusal = f"{member.name[:200].decode('utf-8', 'replace')}: {reason}"

    def _put(self, member: Member, reader: TarReader) -> None:
        name = clean_name(member.name)
        if not name:
            if member.kind == members.DIRECTORY:
                self._marks(member, name)
            return
        if not self._selection.takes(name):
            if member.kind == members.DIRECTORY and not self._selection.below_excluded(name):
                self._marks(member, name)
            return
        maker = self._makers.get(member.kind)
        if maker is None:
            raise Refused("devices and the like are not restored")
        maker(member, name, reader)
        self.outcome.members += 1

    # -- kinds ------------------------------------------------------------------------------------------------------

    def _file(self, member: Member, name: bytes, reader: TarReader) -> None:
        parent, last = self._parent(name)
        file = self._made(parent, last, lambda: os.open(last, _NEW_FILE, 0o600, dir_fd=parent))
        try:
            self._fill(file, member, reader)
            _set_attributes(file, member.attributes)
        finally:
            os.close(file)

    def _fill(self, file: int, member: Member, reader: TarReader) -> None:
        if member.extents is None:
            for piece in reader.content():
                self._count(len(piece))
                _write(file, piece)
            return
        os.ftruncate(file, member.size)
        data = _Data(reader)
        for start, length in member.extents:
            os.lseek(file, start, os.SEEK_SET)
            left = length
            while left:
                piece = data.take(left)
                self._count(len(piece))
                _write(file, piece)
                left -= len(piece)

    def _count(self, size: int) -> None:
        self.outcome.bytes += size
        if self.outcome.bytes > self._limits.max_bytes:
            raise LimitError(f"its files have more than {self._limits.max_bytes} bytes")

    def _hard_link(self, member: Member, name: bytes, reader: TarReader) -> None:
        target = clean_name(member.link)
        if not target or self._selection.below_excluded(target):
            raise Refused("a hard link to nothing")
        folder, _, last_of_target = target.rpartition(b"/")
        source = linux.openat2(self._root, folder or b".", _FOLDER, _BELOW)
        try:
            if not stat.S_ISREG(os.stat(last_of_target, dir_fd=source, follow_symlinks=False).st_mode):
                raise Refused("a hard link to what is no file")
            parent, last = self._parent(name)
            if name == target:
                return
            self._made(
                parent,
                last,
                lambda: os.link(last_of_target, last, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False),
            )
        finally:
            os.close(source)

    def _symlink(self, member: Member, name: bytes, reader: TarReader) -> None:
        parent, last = self._parent(name)
        attributes = member.attributes
        self._made(parent, last, lambda: os.symlink(member.link, last, dir_fd=parent))
        os.chown(last, _id(attributes.uid), _id(attributes.gid), dir_fd=parent, follow_symlinks=False)
        _set_times(last, attributes.mtime_ns, parent)

    def _fifo(self, member: Member, name: bytes, reader: TarReader) -> None:
        parent, last = self._parent(name)
        attributes = member.attributes
        self._made(parent, last, lambda: os.mkfifo(last, 0o600, dir_fd=parent))
        os.chown(last, _id(attributes.uid), _id(attributes.gid), dir_fd=parent, follow_symlinks=False)
        os.chmod(last, attributes.mode, dir_fd=parent)  # it is ours, just made, and nothing else runs here
        _set_times(last, attributes.mtime_ns, parent)

    def _directory(self, member: Member, name: bytes, reader: TarReader) -> None:
        self._enter(name)
        self._apply_marks(member)
        _set_attributes(self._folder_fd, member.attributes)
        self._times[name] = member.attributes.mtime_ns

    # -- deletions --------------------------------------------------------------------------------------------------

    def _marks(self, member: Member, name: bytes) -> None:
        """Of the root, which is never emptied, and of a folder that is not selected itself: entries of it may be."""
        prefix = name + b"/" if name else b""
        selected = tuple(each for each in member.deleted if self._selection.takes(prefix + each))
        if selected:
            self._enter(name)
            self._delete(selected)

    def _apply_marks(self, member: Member) -> None:
        if member.opaque:
            with os.scandir(self._folder_fd) as entries:
                found = tuple(os.fsencode(entry.name) for entry in entries)
            self._delete(found)
        self._delete(member.deleted)

    def _delete(self, names: tuple[bytes, ...]) -> None:
        """Only from the root file system: what is mounted is never emptied by what an archive says about the image."""
        if os.fstat(self._folder_fd).st_dev != self._device:
            return
        for name in names:
            if name in {b".", b".."}:
                raise Refused("a deletion of what is no name")
            try:
                remove(self._folder_fd, name, self._device)
            except FileNotFoundError:
                continue

    # -- places -----------------------------------------------------------------------------------------------------

    def _made(self, parent: int, last: bytes, make: Callable[[], _T]) -> _T:
        """What is in the place goes."""
        try:
            return make()
        except FileExistsError:
            remove(parent, last, self._device)
            return make()

    def _parent(self, name: bytes) -> tuple[int, bytes]:
        """The folder that a member is in, made if need be. It is kept open until another one is asked for."""
        folder, _, last = name.rpartition(b"/")
        self._enter(folder)
        return self._folder_fd, last

    def _enter(self, folder: bytes) -> None:
        if folder == self._folder:
            return
        try:
            fd = linux.openat2(self._root, folder or b".", _FOLDER, _BELOW)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ELOOP, errno.ENOTDIR}:
                raise
            fd = self._walk_to(folder)
        os.close(self._folder_fd)
        self._folder_fd, self._folder = fd, folder

    def _walk_to(self, folder: bytes) -> int:
        fd = os.dup(self._root)
        try:
            for part in folder.split(b"/"):
                deeper = self._step(fd, part)
                os.close(fd)
                fd = deeper
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _step(self, fd: int, part: bytes) -> int:
        """A folder in a folder. Where the sandbox has something else, even a link to a folder, the archive wins."""
        try:
            return os.open(part, _FOLDER, dir_fd=fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in {errno.ELOOP, errno.ENOTDIR}:
                raise
            os.unlink(part, dir_fd=fd)
        os.mkdir(part, 0o755, dir_fd=fd)
        return os.open(part, _FOLDER, dir_fd=fd)

    def _set_folder_time(self, name: bytes, mtime_ns: int) -> None:
        try:
            fd = linux.openat2(self._root, name, _FOLDER, _BELOW)
        except OSError:
            return  # replaced by a later member
        try:
            os.utime(fd, ns=(mtime_ns, mtime_ns))
        except OSError:
            self.outcome.refused += 1
        finally:
            os.close(fd)


class _Data:
    """A member's data in pieces of the wanted size."""

    def __init__(self, reader: TarReader) -> None:
        self._pieces = reader.content()
        self._rest = b""

    def take(self, most: int) -> bytes:
        if not self._rest:
            self._rest = next(self._pieces)
        piece, self._rest = self._rest[:most], self._rest[most:]
        return piece


def clean_name(name: bytes) -> bytes:
    """A member's name without `.` and slashes that mean nothing. Raises `Refused` for what leads elsewhere."""
    parts = [part for part in name.split(b"/") if part not in {b"", b"."}]
    if b".." in parts or b"\0" in name:
        raise Refused("a path with .. in it")
    if len(name) > MAX_NAME_BYTES or any(len(part) > _MAX_PART_BYTES for part in parts):
        raise Refused("a path that is too long")
    return b"/".join(parts)


def remove(folder: int, name: bytes, device: int, depth: int = 0) -> None:
    """Removes an entry with all that is in it, as far as it is on the file system `device`."""
    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode):
        os.unlink(name, dir_fd=folder)
        return
    if status.st_dev != device or depth > _MAX_DEPTH:
        raise Refused("a folder in the way that is not to be removed")
    fd = os.open(name, _FOLDER, dir_fd=folder)
    try:
        with os.scandir(fd) as entries:
            below = [os.fsencode(entry.name) for entry in entries]
        for each in below:
            remove(fd, each, device, depth + 1)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=folder)


def _write(file: int, piece: bytes) -> None:
    written = os.write(file, piece)
    if written < len(piece):
        view = memoryview(piece)[written:]
        while view:
            view = view[os.write(file, view) :]


def _set_attributes(file: int, attributes: Attributes) -> None:
    """The owner first, since changing it takes rights away; the time last."""
    os.fchown(file, _id(attributes.uid), _id(attributes.gid))
    os.fchmod(file, attributes.mode)
    for key, value in attributes.xattrs.items():
        try:
            os.setxattr(file, key, value)
        except OSError as error:
            if error.errno not in {errno.EPERM, errno.ENOTSUP, errno.EINVAL, errno.ERANGE, errno.E2BIG, errno.EACCES}:
                raise
    os.utime(file, ns=(attributes.mtime_ns, attributes.mtime_ns))


def _set_times(name: bytes, mtime_ns: int, folder: int) -> None:
    os.utime(name, ns=(mtime_ns, mtime_ns), dir_fd=folder, follow_symlinks=False)


def _id(number: int) -> int:
    return number if number <= _MAX_ID else NOBODY
