"""Which store keeps the snapshots of a configuration, and archives that are known to be whole before they are used."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import BinaryIO, ClassVar, Final, cast

from msgspec import Struct

from hiverd import plugins
from hiverd.contracts.errors import HiverError, InvalidError, NotFoundError
from hiverd.contracts.snapshot import SnapshotInfo, SnapshotStore, closing, damaged_snapshot, verified
from hiverd.sandboxes.mounts import MountPlanner, PlannedMount
from hiverd.sandboxes.snapshot_mounts import Locks, MountStore, SnapshotReplacedError
from hiverd.sandboxes.snapshot_places import FolderPlace, Place, RemotePlace, acquired
from hiverd.sandboxes.snapshot_spool import Spool, spooled
from hiverd.settings import SnapshotsSettings
from hiverd.wire.config import SandboxConfig

log = logging.getLogger(__name__)

START_SECONDS: Final = 15.0
"""How long the start of the server waits for a store that is far away."""
MOUNT_FIELD: Final = "snapshot.files.mount"
_MOUNT_THREADS: Final = 4
_TRIES: Final = 10


class Fetched(Struct, frozen=True):
    """A snapshot whose every byte is here and has been compared with its checksum."""

    info: SnapshotInfo
    file: BinaryIO
    """At its beginning; for reading. Nobody else changes it, and it need not have a name."""


async def open_store(settings: SnapshotsSettings, instance: str) -> SnapshotStore:
    """The operator's store, started; the caller closes it. `instance` names this server.

    Raises `InvalidError` if the settings name none that can be used. One that merely does not answer now is no reason
    not to serve sandboxes: that is logged.
    """
    plugin = await asyncio.to_thread(plugins.load, "hiver.snapshots", settings.store, field="snapshots.store")
    options = {
        **settings.options,
        "keep": settings.keep,
        "path": str(settings.path),
        "url": settings.url,
        "instance": instance,
    }
    # Judging a URL may import the library for its scheme.
    store = cast("SnapshotStore", await asyncio.to_thread(plugins.build, plugin, options))
    try:
        await asyncio.wait_for(store.start(), START_SECONDS)
    except InvalidError:
        await store.close()
        raise
    except TimeoutError:
        log.warning("the snapshot store does not answer; snapshots fail until it does")
    except HiverError as error:
        log.warning("snapshots fail for now: %s", error.message)
    return store


class SnapshotStores:
    """The operator's store, `default`, and those in mounts of configurations. `spool`: a folder of this server's for
    archives on their way."""

    def __init__(self, default: SnapshotStore, settings: SnapshotsSettings, planner: MountPlanner, spool: Path) -> None:
        self.default = default
        self._settings = settings
        self._planner = planner
        self._spool = spool
        self._locks = Locks()
        self._threads = ThreadPoolExecutor(_MOUNT_THREADS, thread_name_prefix="snapshot-mounts")

    @property
    def max_bytes(self) -> int:
        """Of an archive that comes in."""
        return self._settings.max_mib << 20

    def close(self) -> None:
        """The operator's store is not closed: whoever opened it does that."""
        self._threads.shutdown(wait=False)

    # -- which store --------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def chosen(
        self, config: SandboxConfig, mount: str | None, volume: Path | None
    ) -> AsyncIterator[SnapshotStore]:
        """For one capture or restore. `mount`: `snapshot.files.mount`; None: the operator's. `volume`: the sandbox's.

        Raises `InvalidError` naming the mount if the configuration has none of that path, and what its plug-in says.
        """
        if mount is None:
            yield self.default
            return
        plan = self._planner.plan_mount(config, mount)
        if plan is None:
            raise InvalidError(f"{MOUNT_FIELD}: must be the mount of an entry of fs", field=MOUNT_FIELD)
        async with AsyncExitStack() as stack:
            yield await self._mount_store(plan, volume, stack)

    async def _mount_store(self, plan: PlannedMount, volume: Path | None, stack: AsyncExitStack) -> SnapshotStore:
        if plan.remote:
            return self._store_in(await self._remote_place(plan, stack), plan)
        if plan.origin is not None:
            return self._store_in(FolderPlace(Path(plan.origin), self._threads), plan)
        if plan.kind == "internal" or volume is None:
            return self.default  # nobody sees it, and it would end with the sandbox
        folder = await asyncio.to_thread(self._planner.prepare, plan, volume)
        return CopyingStore(self.default, self._store_in(FolderPlace(Path(folder.source), self._threads), plan))

    def _store_in(self, place: Place, plan: PlannedMount) -> MountStore:
        return MountStore(place, self._spool, self._locks, repr(plan.data))

    async def _remote_place(self, plan: PlannedMount, stack: AsyncExitStack) -> RemotePlace:
        """A mount server, if there is one, shows it to the agent; this goes to the service past it, so that what is
        reported as stored is with the service."""
        plugin = await asyncio.to_thread(plugins.file_system_class, plan.backend, field=f"{plan.field}.backend")
        files = plugins.build(plugin, plan.entry)
        stack.push_async_callback(files.close)
        await files.open()
        return RemotePlace(files)

    # -- reading ------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def fetched(self, store: SnapshotStore, key: str, version: str | None = None) -> AsyncIterator[Fetched]:
        """The newest or the named version, whole and compared before the body of the `async with` begins.

        Raises `NotFoundError`, `SnapshotDamagedError`, `UnavailableError` without space, `HiverError` if it is larger
        than the operator allows, and what the store raises.
        """
        async with AsyncExitStack() as stack:
            yield await self._fetched(store, key, version, stack)

    async def _fetched(self, store: SnapshotStore, key: str, version: str | None, stack: AsyncExitStack) -> Fetched:
        """Tries again if the newest version has gone because there is a newer one."""
        for left in reversed(range(_TRIES)):
            info = await store.find(key, version)
            try:
                return await self._fetch(store, info, stack)
            except (NotFoundError, SnapshotReplacedError):
                if version is not None or not left:
                    raise
        raise AssertionError  # the last try returns or raises

    async def _fetch(self, store: SnapshotStore, info: SnapshotInfo, stack: AsyncExitStack) -> Fetched:
        file = await self._opened_here(store, info)
        if file is not None:
            stack.enter_context(file)
            return Fetched(info, file)
        content = store.get(info.key, info.version)
        spool = await stack.enter_async_context(spooled(self._spool, content, self.max_bytes))
        _require_same(info, spool)
        await asyncio.to_thread(spool.finish)
        return Fetched(info, spool.file)

    async def _opened_here(self, store: SnapshotStore, info: SnapshotInfo) -> BinaryIO | None:
        """A file of the store's own needs no copy: it is read twice instead."""
        path = await store.local_file(info) if info.sha256 is not None else None
        if path is None:
            return None
        try:
            file = await acquired(asyncio.to_thread(path.open, "rb", buffering=0))
        except FileNotFoundError:
            return None  # removed since, or never here: `get` tells
        try:
            async for _ in verified(info, _blocks(file)):
                pass
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file


class CopyingStore(SnapshotStore):
    """For a mount on the sandbox's own volume. What counts is in the operator's store: the volume ends with the
    sandbox, and its files are the agent's to change. The mount gets a copy."""

    name: ClassVar[str] = "copying"

    def __init__(self, kept: SnapshotStore, copy: SnapshotStore) -> None:
        super().__init__({})
        self._kept = kept
        self._copy = copy

    async def put(self, key: str, content: AsyncIterator[bytes]) -> SnapshotInfo:
        info = await self._kept.put(key, content)
        try:
            async with closing(self._kept.get(key, info.version)) as stored:
                await self._copy.put(key, stored)
        except HiverError as error:
            log.warning("snapshot %s is stored; its copy in the mount is not: %s", key, error.message)
        return info

    def get(self, key: str, version: str | None = None) -> AsyncIterator[bytes]:
        return self._kept.get(key, version)

    def list(self, key: str | None = None) -> AsyncIterator[SnapshotInfo]:
        return self._kept.list(key)

    async def delete(self, key: str, version: str | None = None) -> None:
        await self._kept.delete(key, version)

    async def local_file(self, info: SnapshotInfo) -> Path | None:
        return await self._kept.local_file(info)


def _require_same(info: SnapshotInfo, spool: Spool) -> None:
    """The store has compared already; a third party's may have forgotten to."""
    if info.sha256 is not None and spool.sha256 != info.sha256:
        raise damaged_snapshot(info)


async def _blocks(file: BinaryIO) -> AsyncIterator[bytes]:
    while block := await asyncio.to_thread(file.read, 1 << 20):
        yield block
