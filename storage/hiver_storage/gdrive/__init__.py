"""The backend `gdrive`: a folder of Google Drive, through PyDrive2 and Drive's API v3 (PROTOCOL 4.2).

What a mount shows is told in `entries`. Beyond that:

- `gdrive_folder_id` is the root of the mount (a shared drive's id works too), `gdrive_prefix` a path below it that is
  made when something is first written.
- Deleting moves to the drive's trash, where the owner finds it. What lies in the trash is not shown.
- Drive has no conditional writes. The version is compared right before the content goes (of large content, before its
  last chunk); what others write in the moment between is found among the revisions afterwards, made current again, and
  reported as a conflict. Of two files that are made at once, the later one goes. For that moment, readers see ours.
- A repeated request makes nothing twice: ids of new files are chosen beforehand.
- Ids are cached; what others rename or replace is seen by `stat` and listings at once, by reads after some seconds, and
  folders that others move, after half a minute.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, suppress
from typing import Any, ClassVar, Final

from hiver_storage.names import split
from hiver_storage.retrying import Locks, Patience, collected, error
from hiverd.contracts.errors import InvalidError
from hiverd.contracts.filesystem import FileSystem, Info, VersionConflictError

from .auth import Auth, text
from .entries import Entry, info, link_properties, to_drive
from .reading import read
from .revisions import undo_if_another_wrote
from .service import Service, token_url
from .tree import SHARED, Path, Tree
from .upload import SMALL_BYTES, Target, media_type, send_big, send_small

_LINK_TYPE: Final = "application/x-symlink"


class GDriveFileSystem(FileSystem):
    """Members `gdrive_*` of the configuration. `open` starts nothing; threads start when they are needed."""

    backend: ClassVar[str] = "gdrive"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        folder_id = text(config, "gdrive_folder_id") or "root"
        if not folder_id.replace("-", "").replace("_", "").isalnum() or not folder_id.isascii():
            raise InvalidError("gdrive_folder_id must be the id of a folder", field="gdrive_folder_id")
        self._prefix = _parse_prefix(text(config, "gdrive_prefix"))
        self._service = Service(Auth(config, token_url()))
        self._tree = Tree(self._service, folder_id)
        self._locks = Locks()

    def __repr__(self) -> str:
        return "<GDriveFileSystem>"

    @property
    def patience(self) -> Patience:
        return self._service.patience

    async def close(self) -> None:
        await self._service.close()

    # -- looking ------------------------------------------------------------------------------------------------------

    async def stat(self, path: str) -> Info:
        """Raises FileNotFoundError. A link is described itself."""
        names = self._path(path)
        if path == "/":
            return info(self._tree.root, path)
        return info(_existing(await self._tree.find(names), path), path)

    async def list_directory(self, path: str) -> AsyncIterator[Info]:
        """Raises FileNotFoundError, NotADirectoryError."""
        names = self._path(path)
        folder = await self._tree.folder(names)
        entries = {} if folder is None else await self._tree.children(folder)
        if not entries and path != "/":
            # What is not there, and a folder that others have moved or removed, give nothing as well.
            entry = _existing(await self._tree.find(names), path)
            if not entry.is_dir:
                raise error(errno.ENOTDIR, path)
            if folder is None or entry.id != folder.id:
                entries = await self._tree.children(entry)
        for name, entry in entries.items():
            self._tree.learn((*names, name), entry)
            yield info(entry, f"{path.rstrip('/')}/{name}")

    async def read(self, path: str, offset: int, size: int | None) -> AsyncIterator[bytes]:
        """Raises FileNotFoundError; EISDIR, EINVAL for what is no file."""
        names = self._path(path)
        given = False
        for fresh in (False, True):
            entry = _existing(await self._tree.find(names, fresh=fresh), path)
            try:
                async with aclosing(read(self._service, self._tree, entry, path, offset, size)) as pieces:
                    async for piece in pieces:
                        given = True
                        yield piece
            except FileNotFoundError:  # removed or replaced since we looked
                self._tree.forget(names)
                if fresh or given:
                    raise OSError(errno.EIO if given else errno.ENOENT, "the file has gone", path) from None
            else:
                return

    # -- changing -----------------------------------------------------------------------------------------------------

    async def write(self, path: str, content: AsyncIterator[bytes], *, size: int, expected_version: str | None) -> Info:
        names = self._path(path, changing=True)
        data = await collected(content, size) if size <= SMALL_BYTES else None
        async with self._locks(names):
            current = await self._tree.find(names)
            _require_version(current, expected_version, path)
            _require_file(current, path)
            target = await self._target(names, current, {})
            try:
                if data is not None:
                    entry = await self._send_small(target, names, data)
                    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
                else:

                    async def before_last() -> None:
                        _require_version(await self._tree.find(names), expected_version, path)

                    entry, md5 = await send_big(
                        self._service, target, names[-1], content, size, before_last=before_last
                    )
            except FileNotFoundError:
                self._tree.forget(names)
                raise VersionConflictError(errno.ENOENT, "removed meanwhile", path) from None
            if expected_version is not None:
                await self._require_first(names, entry, current, md5, path)
            self._tree.learn(names, entry)
            return info(entry, path)

    async def _send_small(self, target: Target, names: Path, data: bytes) -> Entry:
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()

        async def resumed() -> Entry | None:
            entry = await self._tree.by_id(target.file_id)
            return entry if entry is not None and entry.md5 == md5 and not entry.trashed else None

        try:
            return await send_small(self._service, target, names[-1], data, resumed)
        except FileExistsError:  # by httplib2's own second attempt
            return await self._tree.made(target.file_id)

    async def _target(self, names: Path, current: Entry | None, properties: dict[str, str]) -> Target:
        """`properties`: what makes it a link; those of an earlier link go."""
        removed = dict.fromkeys(current.link_keys if current else ())
        body: dict[str, Any] = {"properties": {**removed, **properties}} if removed or properties else {}
        if current is not None:
            kind = _LINK_TYPE if properties else media_type(names[-1])
            return Target({**body, "mimeType": kind}, file_id=current.id, is_new=False)
        parent = await self._tree.make(names[:-1])
        body |= {"name": to_drive(names[-1]), "parents": [parent.id]}
        if properties:
            body["mimeType"] = _LINK_TYPE
        return Target(body, file_id=await self._tree.new_id(), is_new=True)

    async def _require_first(self, names: Path, entry: Entry, current: Entry | None, md5: str, path: str) -> None:
        """After a conditional write: `VersionConflictError` if another one came in between, with theirs in place."""
        if current is not None:
            if await undo_if_another_wrote(self._service, entry, current, md5):
                self._tree.forget(names)
                raise VersionConflictError(errno.EEXIST, "changed meanwhile", path)
            return
        parent = await self._tree.make(names[:-1])
        siblings = await self._tree.named(parent.id, [entry.name])
        first = min([entry, *siblings], key=lambda other: (other.created, other.id))
        if first.id != entry.id:
            await self._tree.remove(entry)
            raise VersionConflictError(errno.EEXIST, "made by another meanwhile", path)

    async def make_directory(self, path: str) -> None:
        """Raises FileExistsError, NotADirectoryError where a file is in the way."""
        names = self._path(path)
        entry = await self._tree.find(names) if path != "/" else None
        if entry is not None and not entry.is_dir:
            raise error(errno.EEXIST, path)
        await self._tree.make(names)

    async def symlink(self, path: str, target: str) -> None:
        names = self._path(path, changing=True)
        properties = link_properties(target)
        async with self._locks(names):
            current = await self._tree.find(names)
            _require_file(current, path)
            made = await self._send_small(await self._target(names, current, properties), names, b"")
            self._tree.learn(names, made)

    async def delete(self, path: str) -> None:
        """Into the trash."""
        names = self._path(path, changing=True)
        async with self._locks(names):
            entry = await self._tree.find(names)
            if entry is None:
                return
            if entry.is_dir and not await self._tree.is_empty(entry):
                raise error(errno.ENOTEMPTY, path)
            await self._trash(entry)
            self._tree.forget(names)

    async def _trash(self, entry: Entry) -> None:
        with suppress(FileNotFoundError):
            await self._service.call(
                lambda api: api.files().update(fileId=entry.id, body={"trashed": True}, fields="id", **SHARED)
            )

    async def move(self, source: str, target: str) -> None:
        """One request, and another one that puts what was at `target` into the trash: for a moment there are two of
        that name."""
        from_path, to_path = self._path(source, changing=True), self._path(target, changing=True)
        async with self._locks(from_path, to_path):
            entry = _existing(await self._tree.find(from_path), source)
            if from_path == to_path:
                return
            if to_path[: len(from_path)] == from_path:
                raise error(errno.EINVAL, target)
            there = await self._tree.find(to_path)
            await self._require_room(entry, there, target)
            into = await self._tree.make(to_path[:-1])
            out_of = _existing(await self._tree.folder(from_path[:-1]), source)
            await self._relocate(entry, _name_for(entry, to_path[-1], target), out_of, into)
            if there is not None:
                await self._trash(there)
            self._tree.forget(from_path)
            self._tree.forget(to_path)

    async def _relocate(self, entry: Entry, name: str, out_of: Entry, into: Entry) -> None:
        parents = {} if out_of.id == into.id else {"addParents": into.id, "removeParents": out_of.id}
        await self._service.call(
            lambda api: api.files().update(fileId=entry.id, body={"name": name}, fields="id", **parents, **SHARED)
        )

    async def _require_room(self, moved: Entry, there: Entry | None, target: str) -> None:
        if there is None:
            return
        if there.is_dir != moved.is_dir:
            raise error(errno.EISDIR if there.is_dir else errno.ENOTDIR, target)
        if there.is_dir and not await self._tree.is_empty(there):
            raise error(errno.ENOTEMPTY, target)

    def _path(self, path: str, *, changing: bool = False) -> Path:
        names = split(path)
        if changing and not names:
            raise error(errno.EBUSY, path)
        return (*self._prefix, *names)


def _parse_prefix(prefix: str) -> Path:
    try:
        return tuple(split("/" + prefix.strip("/")))
    except OSError:
        raise InvalidError("gdrive_prefix must be a path without `.`, `..` and `//`", field="gdrive_prefix") from None


def _existing(entry: Entry | None, path: str) -> Entry:
    if entry is None:
        raise error(errno.ENOENT, path)
    return entry


def _require_file(current: Entry | None, path: str) -> None:
    if current is None:
        return
    if current.is_dir:
        raise error(errno.EISDIR, path)
    if current.body is not None:
        raise OSError(errno.EACCES, "a document of Google's own has no content that could be written", path)


def _require_version(current: Entry | None, expected: str | None, path: str) -> None:
    if expected is None:
        return
    version = "" if current is None else None if current.is_dir else current.version
    if version != expected:
        raise VersionConflictError(errno.EEXIST, "changed meanwhile", path)


def _name_for(entry: Entry, shown: str, path: str) -> str:
    """The name in Drive under which the mount shows the entry as `shown`."""
    if not shown.endswith(entry.suffix) or shown == entry.suffix:
        raise OSError(errno.EACCES, f"a document of Google's own keeps its {entry.suffix}", path)
    return to_drive(shown.removesuffix(entry.suffix))


__all__ = ["GDriveFileSystem"]
