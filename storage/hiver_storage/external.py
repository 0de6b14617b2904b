"""The backend `external`: a server of the operator's own that speaks the HTTP contract of PROTOCOL 6.4.

What the contract leaves open, and what becomes of it here:

- There are no conditional writes. A version is made of a file's time and size; it is compared right before the
  upload, so a change by others in the moment between is overwritten.
- There is no making of directories: they exist by what lies in them. One that was made through this mount exists in
  this process's memory as well, until it is deleted.
- A directory is moved file by file, and is in both places until all are.
- `Range` may be ignored: what comes before the wanted part is then skipped.
- Names that are no UTF-8 have no place in its JSON: EILSEQ.

A user and password in `host` are sent as basic authentication.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any, ClassVar, Final

from hiverd.contracts.filesystem import FileSystem, Info, VersionConflictError

from .external_service import Service, info_of, json_of
from .names import split
from .retrying import Locks, Patience, collected, error, exactly
from .web import CONNECTIONS, failure, range_header, ranged_body, read_on, transport_errors

_BUFFERED_BYTES: Final = 4 << 20
"""Content up to this size is held, so that its upload can be repeated here."""
_REMEMBERED: Final = 20_000


class ExternalFileSystem(FileSystem):
    """`config["host"]` is the base URL. `open` makes the clients."""

    backend: ClassVar[str] = "external"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._service = Service(config.get("host"))
        self._made: set[str] = set()
        self._seen: dict[str, Info] = {}
        self._locks = Locks()
        self._started = datetime.now(UTC)

    def __repr__(self) -> str:
        return "<ExternalFileSystem>"

    @property
    def patience(self) -> Patience:
        return self._service.patience

    async def open(self) -> None:
        self._service.open()

    async def close(self) -> None:
        await self._service.close()

    # -- looking ------------------------------------------------------------------------------------------------------

    async def stat(self, path: str) -> Info:
        """Raises FileNotFoundError. A link is described itself."""
        _check(path)
        if path == "/":
            return Info(path, 0, self._started, is_dir=True)
        response = await self._service.ask("GET", "stat", path)
        if response.status_code == 404:
            if path in self._made:
                return Info(path, 0, self._started, is_dir=True)
            raise error(errno.ENOENT, path)
        return self._remember(info_of(json_of(response), path))

    async def list_directory(self, path: str) -> AsyncIterator[Info]:
        """Raises FileNotFoundError, NotADirectoryError."""
        _check(path)
        response = await self._service.ask("GET", "directory", path)
        found: dict[str, Info] = {}
        if response.status_code != 404:
            entries = json_of(response).get("entries") or []
            found = {info.path: info for entry in entries if (info := info_of(entry)) and _parent(info.path) == path}
        for made in self._made:
            if _parent(made) == path and made not in found:
                found[made] = Info(made, 0, self._started, is_dir=True)
        # A server may answer so for what does not exist, or is a file.
        if not found and not (await self.stat(path)).is_dir:
            raise error(errno.ENOTDIR, path)
        for info in found.values():
            yield self._remember(info)

    async def read(self, path: str, offset: int, size: int | None) -> AsyncIterator[bytes]:
        """Raises FileNotFoundError; EISDIR. One request for a file that was looked at before."""
        _check(path)
        known = self._seen.get(path) or await self.stat(path)
        if known.is_dir:
            raise error(errno.EISDIR, path)
        if size == 0:
            return

        async def part(offset: int, size: int | None) -> AsyncGenerator[bytes, None]:
            request = self._service.request(
                "GET", "file", path, client=self._service.transfers, headers=range_header(offset, size)
            )
            with transport_errors():
                response = await self._service.transfers.send(request, stream=True)
            try:
                if response.status_code not in (200, 206, 416):
                    raise failure(response, path)
                async with aclosing(ranged_body(response, offset, size)) as pieces:
                    async for piece in pieces:
                        yield piece
            finally:
                await response.aclose()

        async def still() -> None:
            if (await self.stat(path)).version != known.version:
                raise OSError(errno.EIO, "the file changed while it was read", path)

        async with aclosing(read_on(part, still, offset, size)) as pieces:
            async for piece in pieces:
                yield piece

    # -- changing -----------------------------------------------------------------------------------------------------

    async def write(self, path: str, content: AsyncIterator[bytes], *, size: int, expected_version: str | None) -> Info:
        """`expected_version` is compared right before."""
        _check(path, changing=True)
        data = await collected(content, size) if size <= _BUFFERED_BYTES else None
        async with self._locks(path):
            current = await self._find(path)
            _require_version(current, expected_version, path)
            if current is not None and current.is_dir:
                raise error(errno.EISDIR, path)
            if current is not None and current.link_target is not None:
                await self._service.change("DELETE", "file", path)  # a server may follow it otherwise
            if data is not None:
                await self._service.change("PUT", "file", path, content=data)
            else:
                await self._stream(path, content, size)
            return await self.stat(path)

    async def _stream(self, path: str, content: AsyncIterator[bytes], size: int) -> None:
        """Once: the content cannot be had again."""

        async def attempt() -> None:
            headers = {"Content-Length": str(size)}
            request = self._service.request(
                "PUT", "file", path, client=self._service.transfers, content=exactly(content, size), headers=headers
            )
            with transport_errors():
                response = await self._service.transfers.send(request)
            if not response.is_success:
                raise failure(response, path)

        await Patience(0).repeat(attempt)

    async def make_directory(self, path: str) -> None:
        """In memory; EEXIST or ENOTDIR where a file is in the way."""
        names = split(path)
        _check(path)
        for depth in range(len(names), 0, -1):
            ancestor = "/" + "/".join(names[:depth])
            info = await self._find(ancestor)
            if info is None:
                continue
            if not info.is_dir:
                raise error(errno.EEXIST if ancestor == path else errno.ENOTDIR, path)
            break
        self._made.update("/" + "/".join(names[:depth]) for depth in range(1, len(names) + 1))

    async def symlink(self, path: str, target: str) -> None:
        _check(path, changing=True)
        _encodable(target)
        async with self._locks(path):
            current = await self._find(path)
            if current is not None and current.is_dir:
                raise error(errno.EISDIR, path)
            if current is not None:
                await self._service.change("DELETE", "file", path)
            await self._service.change("POST", "symlink", json={"path": path, "target": target})

    async def delete(self, path: str) -> None:
        _check(path, changing=True)
        async with self._locks(path):
            current = await self._find(path)
            if current is None:
                return
            if not current.is_dir:
                await self._service.change("DELETE", "file", path)
                return
            async for _ in self.list_directory(path):
                raise error(errno.ENOTEMPTY, path)
            if path not in self._made or (await self._service.ask("GET", "stat", path)).status_code != 404:
                await self._service.change("DELETE", "file", path)  # a real one of the server's own
            self._made.discard(path)

    async def move(self, source: str, target: str) -> None:
        """Of a directory, file by file."""
        _check(source, changing=True)
        _check(target, changing=True)
        async with self._locks(source, target):
            moved = await self.stat(source)
            if source == target:
                return
            await self._require_room(moved, source, target)
            if moved.is_dir:
                await self._move_directory(source, target)
            else:
                await self._move_file(moved, source, target)

    async def _require_room(self, moved: Info, source: str, target: str) -> None:
        if target.startswith(f"{source}/"):
            raise error(errno.EINVAL, target)
        there = await self._find(target)
        if there is None:
            return
        if there.is_dir != moved.is_dir:
            raise error(errno.EISDIR if there.is_dir else errno.ENOTDIR, target)
        if there.is_dir:
            async for _ in self.list_directory(target):
                raise error(errno.ENOTEMPTY, target)
        elif there.link_target is not None:
            await self._service.change("DELETE", "file", target)  # a server may follow it otherwise

    async def _move_file(self, moved: Info, source: str, target: str) -> None:
        response = await self._service.change("POST", "move", json={"src": source, "dst": target}, missing_ok=True)
        if response.status_code == 404:  # perhaps by an earlier attempt of ours
            there = await self._find(target)
            if there is None or (there.size, there.link_target) != (moved.size, moved.link_target):
                raise error(errno.ENOENT, source)

    async def _move_directory(self, source: str, target: str) -> None:
        entries = [info async for info in self.list_directory(source)]
        files = [info for info in entries if not info.is_dir]
        gate = asyncio.Semaphore(CONNECTIONS // 2)

        async def one(info: Info) -> None:
            async with gate:
                await self._move_file(info, info.path, target + info.path[len(source) :])

        await asyncio.gather(*map(one, files))
        for info in entries:
            if info.is_dir:
                await self._move_directory(info.path, target + info.path[len(source) :])
        if source in self._made or not entries:
            self._made.discard(source)
            self._made.add(target)
        await self._service.change("DELETE", "file", source, missing_ok=True)

    def _remember(self, info: Info) -> Info:
        """For `read`, which goes on after a cut only if the file is still the one that it was."""
        self._seen.pop(info.path, None)
        if not info.is_dir:
            self._seen[info.path] = info
        if len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]
        return info

    async def _find(self, path: str) -> Info | None:
        try:
            return await self.stat(path)
        except FileNotFoundError:
            return None


def _check(path: str, *, changing: bool = False) -> None:
    if not split(path) and changing:
        raise error(errno.EBUSY, path)
    _encodable(path)


def _encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise OSError(errno.EILSEQ, "the service takes only names that are UTF-8") from None


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def _require_version(current: Info | None, expected: str | None, path: str) -> None:
    if expected is None:
        return
    version = "" if current is None else current.version
    if version != expected:
        raise VersionConflictError(errno.EEXIST, "changed meanwhile", path)
