"""From paths to Drive's ids: a cache of what was seen, walks where it does not reach, and folders that are made."""

from __future__ import annotations

import asyncio
import errno
import time
from collections import OrderedDict
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from hiver_storage.retrying import Locks, error

from .entries import FIELDS, FOLDER, Entry, by_shown_name, drive_names, id_in_name, parse, to_drive
from .service import Service

_FOLDER_SECONDS: Final = 30.0
"""How long a folder's id is taken for granted: so long others may move it before we look where the path leads now."""
_FILE_SECONDS: Final = 10.0
_DOUBT_SECONDS: Final = 2.0
"""A folder known for longer than this is looked up again before something in it is said to be missing."""
_KNOWN: Final = 100_000
_PAGE: Final = 1000
_IDS: Final = 200

Path = tuple[str, ...]

SHARED: Final[dict[str, Any]] = {"supportsAllDrives": True}
SEARCH: Final[dict[str, Any]] = {
    **SHARED,
    "includeItemsFromAllDrives": True,
    "pageSize": _PAGE,
    "fields": f"nextPageToken,incompleteSearch,files({FIELDS})",
}


class Tree:
    """Names are those of the mount (`entries`), from the folder `folder_id` on."""

    def __init__(self, service: Service, folder_id: str) -> None:
        self._service = service
        self._root_id = folder_id
        self.root = Entry(folder_id, "", FOLDER, 0, datetime.now(UTC), "", (), False, "root", None, None, None)
        self._known: OrderedDict[Path, tuple[Entry, float]] = OrderedDict()
        self._locks = Locks()
        self._ids: list[str] = []
        self._fetching_ids = asyncio.Lock()

    # -- finding ------------------------------------------------------------------------------------------------------

    async def find(self, path: Path, *, fresh: bool = True) -> Entry | None:
        """What is there. Not `fresh`: what was there some seconds ago is good enough."""
        if not path:
            return self.root
        if not fresh and (known := self._recall(path, _FILE_SECONDS)) is not None:
            return known
        parent = await self.folder(path[:-1])
        entry = None if parent is None else await self._child(parent, path[-1])
        if entry is None and self._recall(path[:-1], _FOLDER_SECONDS) and not self._recall(path[:-1], _DOUBT_SECONDS):
            self.forget(path[:1])
            parent = await self.folder(path[:-1])
            entry = None if parent is None else await self._child(parent, path[-1])
        if entry is None:
            self.forget(path)
        else:
            self.learn(path, entry)
        return entry

    async def folder(self, path: Path) -> Entry | None:
        """A folder, or None if there is none of that path."""
        if not path:
            return self.root
        entry = self._recall(path, _FOLDER_SECONDS) or await self.find(path)
        return entry if entry is not None and entry.is_dir else None

    async def _child(self, parent: Entry, name: str) -> Entry | None:
        found = by_shown_name(await self.named(parent.id, drive_names(name))).get(name)
        if found is not None or (file_id := id_in_name(name)) is None:
            return found
        entry = await self.by_id(file_id)
        if entry is None or entry.trashed:
            return None
        # Only if the folder's listing shows it so: no file has a second name that a rule does not know.
        siblings = await self.named(parent.id, drive_names(entry.plain))
        found = by_shown_name(siblings).get(name)
        return found if found is not None and found.id == entry.id else None

    async def by_id(self, file_id: str) -> Entry | None:
        try:
            return parse(await self._service.call(lambda api: api.files().get(fileId=file_id, fields=FIELDS, **SHARED)))
        except FileNotFoundError:
            return None

    async def named(self, parent_id: str, names: Sequence[str]) -> list[Entry]:
        """All files of these names in Drive. The service may compare them loosely, so they are compared again."""
        wanted = " or ".join(f"name = {_quoted(name)}" for name in names)
        found = await self.search(f"{_quoted(parent_id)} in parents and trashed = false and ({wanted})")
        return [entry for entry in found if entry.name in names]

    async def children(self, parent: Entry) -> dict[str, Entry]:
        """Everything in a folder, by the mount's names: one request per 1000."""
        return by_shown_name(await self.search(f"{_quoted(parent.id)} in parents and trashed = false"))

    async def is_empty(self, parent: Entry) -> bool:
        query = f"{_quoted(parent.id)} in parents and trashed = false"
        options = {**SEARCH, "pageSize": 1}
        page = await self._service.call(lambda api: api.files().list(q=query, **options))
        return not page.get("files") and not page.get("nextPageToken")

    async def search(self, query: str) -> list[Entry]:
        found: list[Entry] = []
        token: str | None = None
        while True:
            page = await self._page(query, token)
            if page.get("incompleteSearch"):
                raise OSError(errno.EIO, "Drive did not search everything")
            found += map(parse, page.get("files", ()))
            token = page.get("nextPageToken")
            if not token:
                return found

    async def _page(self, query: str, token: str | None) -> dict[str, Any]:
        page: dict[str, Any] = await self._service.call(
            lambda api: api.files().list(q=query, pageToken=token, **SEARCH)
        )
        return page

    # -- making folders -----------------------------------------------------------------------------------------------

    async def make(self, path: Path) -> Entry:
        """A folder of that path, with missing parents. `OSError` ENOTDIR or EEXIST if something else is in the way."""
        folder = await self.folder(path)
        if folder is not None:
            return folder
        parent = await self.make(path[:-1])
        async with self._locks(path):
            entry = await self.find(path)
            if entry is None:
                entry = await self._make_in(parent, path)
            if not entry.is_dir:
                raise error(errno.ENOTDIR, "/".join(path))
            return entry

    async def _make_in(self, parent: Entry, path: Path) -> Entry:
        name = to_drive(path[-1])
        made = await self.create({"name": name, "mimeType": FOLDER, "parents": [parent.id]})
        # Drive lets two be made at once. All who did so agree on the first.
        rivals = [entry for entry in await self.named(parent.id, [name]) if entry.is_dir]
        first = min([made, *rivals], key=lambda entry: (entry.created, entry.id))
        if first.id != made.id:
            await self.remove(made)
        self.learn(path, first)
        return first

    async def create(self, body: dict[str, Any]) -> Entry:
        """A file without content. The id is chosen beforehand, so that a repeated request makes no second one."""
        file_id = await self.new_id()
        try:
            made = await self._service.call(
                lambda api: api.files().create(body={**body, "id": file_id}, fields=FIELDS, **SHARED)
            )
        except FileExistsError:  # by an attempt whose answer was lost
            return await self.made(file_id)
        return parse(made)

    async def made(self, file_id: str) -> Entry:
        entry = await self.by_id(file_id)
        if entry is None:
            raise OSError(errno.EIO, "Drive does not know the file that it says exists")
        return entry

    async def new_id(self) -> str:
        async with self._fetching_ids:
            if not self._ids:
                answer = await self._service.call(lambda api: api.files().generateIds(count=_IDS, space="drive"))
                self._ids = list(answer["ids"])
            return self._ids.pop()

    async def remove(self, entry: Entry) -> None:
        """For good: only for what we made ourselves a moment ago."""
        try:
            await self._service.call(lambda api: api.files().delete(fileId=entry.id, **SHARED))
        except FileNotFoundError:
            return

    # -- remembering --------------------------------------------------------------------------------------------------

    def learn(self, path: Path, entry: Entry) -> None:
        self._known[path] = entry, time.monotonic()
        self._known.move_to_end(path)
        while len(self._known) > _KNOWN:
            self._known.popitem(last=False)

    def forget(self, path: Path) -> None:
        """The path and all that is below it."""
        known = self._known.pop(path, None)
        if known is None or known[0].is_dir:
            for below in [other for other in self._known if other[: len(path)] == path]:
                del self._known[below]

    def _recall(self, path: Path, seconds: float) -> Entry | None:
        known = self._known.get(path)
        if known is None or time.monotonic() - known[1] > seconds:
            return None
        return known[0]


def _quoted(value: str) -> str:
    """A string of Drive's query language."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
