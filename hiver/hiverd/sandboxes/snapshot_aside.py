"""Archives that no store would take at the end of their sandbox: kept aside, and offered again until one does."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from hiverd.contracts.errors import HiverError, NotFoundError
from hiverd.contracts.snapshot import SnapshotStore
from hiverd.snapshots.spool import Span

log = logging.getLogger(__name__)

ABOUT: Final = ".json"
PIECE_BYTES: Final = 1 << 20


class KeptAside(Struct, frozen=True):
    """Beside each archive. Holds the sandbox's configuration, and with it perhaps credentials: mode 0600."""

    key: str
    mount: str | None
    config: msgspec.Raw
    made_at: datetime
    superseded: bool = False
    """The store has a newer snapshot of that key: the archive stays for people, and is not offered any more."""


async def content_of(descriptor: int, spans: list[Span]) -> AsyncIterator[bytes]:
    """The archive whose parts are in a spool file."""
    for span in spans:
        position, end = span.offset, span.offset + span.length
        while position < end:
            piece = await asyncio.to_thread(os.pread, descriptor, min(PIECE_BYTES, end - position), position)
            if not piece:
                raise HiverError("the archive's spool file is cut off")
            position += len(piece)
            yield piece


class Aside:
    """`folder`: `snapshots-failed` in the data folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = asyncio.Lock()

    def keep(self, name: str, descriptor: int, spans: list[Span], about: KeptAside) -> Path:
        """Blocking. The archive is complete, and on disk, as soon as what is told about it is there. `OSError`."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        archive = self._folder / name
        with open(archive, "xb", opener=_private) as file:
            for span in spans:
                _copy(descriptor, span, file.fileno())
            file.flush()
            os.fsync(file.fileno())
        self._tell(archive, about)
        return archive

    def _tell(self, archive: Path, about: KeptAside) -> None:
        draft = archive.with_name(f"{archive.name}.draft")
        draft.unlink(missing_ok=True)
        with open(draft, "xb", opener=_private) as file:
            file.write(msgspec.json.encode(about))
            file.flush()
            os.fsync(file.fileno())
        draft.rename(archive.with_name(f"{archive.name}{ABOUT}"))

    async def offer(
        self, put: Callable[[KeptAside, Callable[[SnapshotStore], Awaitable[None]]], Awaitable[None]]
    ) -> None:
        """Offers each archive again. `put` finds the store and calls what it is given with it."""
        async with self._lock:
            for about_file in sorted(await asyncio.to_thread(self._listed)):
                try:
                    await self._offer_one(about_file, put)
                except (HiverError, OSError, msgspec.MsgspecError) as error:
                    log.warning("%s is still kept aside: %s", about_file.with_suffix(""), error)

    async def _offer_one(
        self,
        about_file: Path,
        put: Callable[[KeptAside, Callable[[SnapshotStore], Awaitable[None]]], Awaitable[None]],
    ) -> None:
        about = msgspec.json.decode(await asyncio.to_thread(about_file.read_bytes), type=KeptAside)
        archive = about_file.with_name(about_file.name.removesuffix(ABOUT))
        if about.superseded:
            return

        async def store(target: SnapshotStore) -> None:
            with suppress(NotFoundError):
                if (await target.find(about.key)).created_at > about.made_at:
                    log.warning("%s stays aside: there is a newer snapshot %s", archive, about.key)
                    newer = msgspec.structs.replace(about, superseded=True)
                    await asyncio.to_thread(self._tell, archive, newer)
                    return
            await target.put(about.key, _pieces(archive))
            log.info("snapshot %s, which was kept aside, is stored", about.key)
            await asyncio.to_thread(_forget, archive, about_file)

        await put(about, store)

    def _listed(self) -> list[Path]:
        return list(self._folder.glob(f"*{ABOUT}")) if self._folder.is_dir() else []


def now() -> datetime:
    return datetime.now(UTC)


def _forget(archive: Path, about_file: Path) -> None:
    about_file.unlink(missing_ok=True)
    archive.unlink(missing_ok=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _copy(source: int, span: Span, target: int) -> None:
    position, end = span.offset, span.offset + span.length
    while position < end:
        piece = os.pread(source, min(PIECE_BYTES, end - position), position)
        if not piece:
            raise OSError(5, "the spool file is cut off")
        view = memoryview(piece)
        while view:
            view = view[os.write(target, view) :]
        position += len(piece)


async def _pieces(file: Path) -> AsyncIterator[bytes]:
    opened = await asyncio.to_thread(file.open, "rb")
    try:
        while piece := await asyncio.to_thread(opened.read, PIECE_BYTES):
            yield piece
    finally:
        opened.close()
