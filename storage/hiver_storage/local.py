"""The backend `local`: a folder of this host, native (PROTOCOL 4.2, 6.5).

The core mounts it with the kernel; this class is for everything that goes around the mount. What lies in the folder is
hostile: every path is walked by descriptors, one component at a time, and no symbolic link is ever followed.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

from hiverd.contracts.errors import InvalidError
from hiverd.contracts.filesystem import FileSystem, Info, VersionConflictError

T = TypeVar("T")

_PIECE_BYTES: Final = 1 << 20
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class LocalFileSystem(FileSystem):
    """`config["origin"]` names the folder: one that the core has judged against the operator's list, or has made."""

    backend: ClassVar[str] = "local"
    native: ClassVar[bool] = True

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        mount = config.get("mount")
        if not isinstance(mount, str) or not mount.startswith("/"):
            raise InvalidError("mount must be an absolute path", field="mount")
        origin = config.get("origin")
        if not isinstance(origin, str) or not origin or "\0" in origin:
            raise InvalidError("origin must name a folder", field="origin")
        self.folder = Path(os.path.abspath(origin))

    async def stat(self, path: str) -> Info:
        """Raises FileNotFoundError. A link is described itself."""

        def work() -> Info:
            with self._parent(path) as (parent_fd, name):
                return _info("/" + "/".join(_parts(path)), parent_fd, name)

        return await asyncio.to_thread(work)

    async def list_directory(self, path: str) -> AsyncIterator[Info]:
        """Raises FileNotFoundError, NotADirectoryError."""

        def work() -> list[Info]:
            prefix = "/" + "".join(part + "/" for part in _parts(path))
            with self._directory(_parts(path)) as fd:
                return [_info(prefix + name, fd, name) for name in sorted(os.listdir(f"/proc/self/fd/{fd}"))]

        for info in await asyncio.to_thread(work):
            yield info

    async def read(self, path: str, offset: int, size: int | None) -> AsyncIterator[bytes]:
        """At most `size` bytes (None: all) from `offset` on. Raises FileNotFoundError; EINVAL if it is no file."""
        fd = await asyncio.to_thread(self._open_regular, path)
        try:
            remaining = size
            while remaining is None or remaining > 0:
                wanted = _PIECE_BYTES if remaining is None else min(_PIECE_BYTES, remaining)
                data = await asyncio.to_thread(os.pread, fd, wanted, offset)
                if not data:
                    return
                offset += len(data)
                remaining = None if remaining is None else remaining - len(data)
                yield data
        finally:
            os.close(fd)

    async def write(self, path: str, content: AsyncIterator[bytes], *, size: int, expected_version: str | None) -> Info:
        """Makes missing parents; `expected_version` is compared just before the new file takes the name."""
        name = _parts(path)[-1:] or _not_a_file()
        parent_fd = await asyncio.to_thread(self._make_directory, _parts(path)[:-1])
        temporary = f".hiver-write-{secrets.token_hex(12)}"
        try:
            fd = os.open(
                temporary,
                os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                0o644,
                dir_fd=parent_fd,
            )
            try:
                written = 0
                async for data in content:
                    written += len(data)
                    await asyncio.to_thread(_write_all, fd, data)
            finally:
                os.close(fd)
            if written != size:
                raise OSError(errno.EINVAL, f"{size} bytes were announced and {written} came", path)
            # Without an await between the two, no other call of this event loop comes in between.
            _require_version(parent_fd, name[0], expected_version)
            os.rename(temporary, name[0], src_dir_fd=parent_fd, dst_dir_fd=parent_fd)
            return _info("/" + "/".join(_parts(path)), parent_fd, name[0])
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=parent_fd)
            os.close(parent_fd)

    async def make_directory(self, path: str) -> None:
        await asyncio.to_thread(lambda: os.close(self._make_directory(_parts(path))))

    async def symlink(self, path: str, target: str) -> None:
        """Takes the name at once, also from a link or a file that has it."""

        def work() -> None:
            name = (_parts(path) or _not_a_file())[-1]
            parent_fd = self._make_directory(_parts(path)[:-1])
            temporary = f".hiver-write-{secrets.token_hex(12)}"
            try:
                os.symlink(target, temporary, dir_fd=parent_fd)
                try:
                    os.rename(temporary, name, src_dir_fd=parent_fd, dst_dir_fd=parent_fd)
                except BaseException:
                    os.unlink(temporary, dir_fd=parent_fd)
                    raise
            finally:
                os.close(parent_fd)

        await asyncio.to_thread(work)

    async def delete(self, path: str) -> None:
        """Removes a file, a link itself or an empty directory; OSError ENOTEMPTY otherwise."""

        def work() -> None:
            with suppress(FileNotFoundError), self._parent(path) as (parent_fd, name):
                if stat.S_ISDIR(os.stat(name, dir_fd=parent_fd, follow_symlinks=False).st_mode):
                    os.rmdir(name, dir_fd=parent_fd)
                else:
                    os.unlink(name, dir_fd=parent_fd)

        await asyncio.to_thread(work)

    async def move(self, source: str, target: str) -> None:
        """Replaces a target file. Raises FileNotFoundError if there is no source."""

        def work() -> None:
            with self._parent(source) as (from_fd, from_name):
                into_fd = self._make_directory(_parts(target)[:-1])
                try:
                    os.rename(from_name, _parts(target)[-1], src_dir_fd=from_fd, dst_dir_fd=into_fd)
                finally:
                    os.close(into_fd)

        _ = _parts(target) or _not_a_file()
        await asyncio.to_thread(work)

    # -- walking by descriptors ---------------------------------------------------------------------------------------

    def _walk(self, parts: Sequence[str], step: Callable[[int, str], int]) -> int:
        """An O_PATH descriptor of a folder below the root; `step` opens a component in its parent."""
        fd = os.open(self.folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        for part in parts:
            parent_fd = fd
            try:
                fd = step(parent_fd, part)
            finally:
                os.close(parent_fd)
        return fd

    @contextmanager
    def _directory(self, parts: Sequence[str]) -> Iterator[int]:
        fd = self._walk(parts, _open_directory)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _parent(self, path: str) -> Iterator[tuple[int, str]]:
        """The descriptor of a path's directory, and the name in it; `.` for the root."""
        *directories, name = _parts(path) or ["."]
        with self._directory(directories) as fd:
            yield fd, name

    def _make_directory(self, parts: Sequence[str]) -> int:
        return self._walk(parts, _open_or_make)

    def _open_regular(self, path: str) -> int:
        with self._parent(path) as (parent_fd, name):
            found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd)
        try:
            if not stat.S_ISREG(os.fstat(found).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            os.close(found)


def _parts(path: str) -> list[str]:
    """Components of a path, lexically cleaned; `..` stops at the root."""
    if "\0" in path:
        raise InvalidError("path contains a NUL byte", field="path")
    kept: list[str] = []
    for part in path.split("/"):
        if part == "..":
            del kept[-1:]
        elif part not in ("", "."):
            kept.append(part)
    return kept


def _not_a_file() -> list[str]:
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), "/")


def _open_directory(parent_fd: int, name: str) -> int:
    return os.open(name, _DIRECTORY, dir_fd=parent_fd)


def _open_or_make(parent_fd: int, name: str) -> int:
    with suppress(FileExistsError):
        os.mkdir(name, 0o755, dir_fd=parent_fd)
    return _open_directory(parent_fd, name)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _require_version(parent_fd: int, name: str, expected: str | None) -> None:
    if expected is None:
        return
    try:
        current = _version(os.stat(name, dir_fd=parent_fd, follow_symlinks=False))
    except FileNotFoundError:
        current = None
    if current != (expected or None):
        raise VersionConflictError(errno.EEXIST, "changed meanwhile", name)


def _version(info: os.stat_result) -> str:
    return f"{info.st_ino}-{info.st_mtime_ns}-{info.st_size}"


def _info(path: str, parent_fd: int, name: str) -> Info:
    info = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
    is_dir = stat.S_ISDIR(info.st_mode)
    link = os.readlink(name, dir_fd=parent_fd) if stat.S_ISLNK(info.st_mode) else None
    size = info.st_size if stat.S_ISREG(info.st_mode) else 0
    mtime = datetime.fromtimestamp(info.st_mtime, UTC)
    return Info(path, size, mtime, is_dir, link, None if is_dir else _version(info))
