"""The served folder: thin functions on its entries. No symbolic link is followed, as workloads lay them out."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FALLOC_FL_KEEP_SIZE: Final = 0x01
_FALLOC_FL_PUNCH_HOLE: Final = 0x02
_PAGE_BYTES: Final = 64 << 10
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]


def split(path: str) -> tuple[str, str]:
    """The directory and the name: `/a/b` is `/a` and `b`, `/a` is `/` and `a`."""
    parent, _, name = path.rpartition("/")
    return parent or "/", name


def join(directory: str, name: str) -> str:
    return directory + name if directory == "/" else f"{directory}/{name}"


def is_name(name: str) -> bool:
    """Whether the folder can hold an entry of this name: a backend's names are not ours."""
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        return False
    return len(os.fsencode(name)) <= 255


class Tree:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._root)

    def owner(self) -> tuple[int, int]:
        """Of the root, as of now: whoever makes the folder hands it over later."""
        found = os.fstat(self._root)
        return found.st_uid, found.st_gid

    @contextmanager
    def directory(self, path: str) -> Iterator[int]:
        """A descriptor that serves as `dir_fd`. `ENOENT`, `ENOTDIR`."""
        fd = os.dup(self._root)
        try:
            for name in path.split("/"):
                if name:
                    below = os.open(name, _DIRECTORY, dir_fd=fd)
                    os.close(fd)
                    fd = below
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def opened(self, path: str, flags: int) -> Iterator[int]:
        """A regular file; `ESTALE` for anything else."""
        parent, name = split(path)
        with self.directory(parent) as directory_fd:
            fd = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory_fd)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
            yield fd
        finally:
            os.close(fd)

    def status(self, path: str) -> os.stat_result | None:
        """Of the entry itself; None if there is none."""
        parent, name = split(path)
        try:
            with self.directory(parent) as directory_fd:
                return os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def remove(self, path: str) -> None:
        """A file, a link or an empty directory; one that is missing, or not empty, stays as it is."""
        parent, name = split(path)
        with suppress(FileNotFoundError, NotADirectoryError), self.directory(parent) as directory_fd:
            try:
                os.unlink(name, dir_fd=directory_fd)
            except IsADirectoryError:
                with suppress(OSError):
                    os.rmdir(name, dir_fd=directory_fd)

    def rename(self, source: str, target: str) -> None:
        source_parent, source_name = split(source)
        target_parent, target_name = split(target)
        with self.directory(source_parent) as source_fd, self.directory(target_parent) as target_fd:
            os.rename(source_name, target_name, src_dir_fd=source_fd, dst_dir_fd=target_fd)

    def copy_beside(self, path: str, name: str) -> None:
        """A copy of a file under another name of the same directory, which appears when it is complete. `EEXIST`."""
        parent, _ = split(path)
        with self.opened(path, os.O_RDONLY) as source, self.directory(parent) as directory_fd:
            here = f"/proc/self/fd/{directory_fd}"
            copy = os.open(here, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o644)
            try:
                _hand_over(copy, self.owner())
                while os.sendfile(copy, source, None, 1 << 30):
                    pass
                # linkat(2): an unnamed file gets its name by its descriptor's entry in proc
                os.link(f"/proc/self/fd/{copy}", name, dst_dir_fd=directory_fd, follow_symlinks=True)
            finally:
                os.close(copy)


def make_file(directory_fd: int, name: str, size: int, mtime_ns: int, owner: tuple[int, int]) -> None:
    """A placeholder: of the right size, without content. `EEXIST`."""
    fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=directory_fd)
    try:
        _hand_over(fd, owner)
        if size:
            os.ftruncate(fd, size)
        os.utime(fd, ns=(mtime_ns, mtime_ns))
    finally:
        os.close(fd)


def make_directory(directory_fd: int, name: str, owner: tuple[int, int]) -> None:
    os.mkdir(name, 0o755, dir_fd=directory_fd)
    if owner != (os.geteuid(), os.getegid()):
        with suppress(PermissionError):
            os.chown(name, *owner, dir_fd=directory_fd, follow_symlinks=False)


def make_link(directory_fd: int, name: str, target: str, owner: tuple[int, int]) -> None:
    os.symlink(target, name, dir_fd=directory_fd)
    if owner != (os.geteuid(), os.getegid()):
        with suppress(PermissionError):
            os.chown(name, *owner, dir_fd=directory_fd, follow_symlinks=False)


def _hand_over(fd: int, owner: tuple[int, int]) -> None:
    if owner != (os.geteuid(), os.getegid()):
        with suppress(PermissionError):  # not root: everything is ours
            os.fchown(fd, *owner)


def write_at(fd: int, offset: int, piece: bytes, mtime_ns: int) -> None:
    """Content that came from the service: the time of change stays the service's."""
    view = memoryview(piece)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written
    os.utime(fd, ns=(mtime_ns, mtime_ns))


def empty(fd: int, size: int, mtime_ns: int) -> None:
    """Frees all content. The size does not even for a moment become another one, if it is right already."""
    if os.fstat(fd).st_size == size:
        whole_pages = -(-size // _PAGE_BYTES) * _PAGE_BYTES  # of the last page only zeroes would be left
        if size and _libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, 0, whole_pages):
            os.ftruncate(fd, 0)  # a file system without holes
            os.ftruncate(fd, size)
    else:
        os.ftruncate(fd, 0)
        os.ftruncate(fd, size)
    os.utime(fd, ns=(mtime_ns, mtime_ns))
