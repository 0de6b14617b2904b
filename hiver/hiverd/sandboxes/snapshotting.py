"""When a sandbox's files are captured and restored, and what becomes of it when that fails (docs/snapshots.md)."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from io import FileIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Final

import msgspec
from msgspec import Struct

from hiverd.contracts.errors import BackendError, HiverError, NotFoundError, UnavailableError, UnsupportedError
from hiverd.contracts.isolation import Isolation
from hiverd.contracts.snapshot import SnapshotInfo, SnapshotStore
from hiverd.sandboxes import snapshot_plan
from hiverd.sandboxes.sandbox import Sandbox
from hiverd.sandboxes.snapshot_aside import Aside, KeptAside, content_of, now
from hiverd.sandboxes.snapshot_plan import FilesPlan
from hiverd.sandboxes.snapshot_stores import SnapshotStores
from hiverd.settings import SnapshotsSettings
from hiverd.snapshots.client import Worker, WorkerFailedError
from hiverd.snapshots.frames import CaptureOrder, RestoreOrder
from hiverd.snapshots.spool import Span
from hiverd.wire.answers import SnapshotPartResult, SnapshotResult
from hiverd.wire.config import config_of_document
from hiverd.wire.events import SystemFsSyncRequestEvent, SystemFsSyncResponseEvent
from hiverd.wire.requests import SnapshotRequest

log = logging.getLogger(__name__)

CAPTURE_TRIES: Final = 3
"""At the end of a sandbox, where not even an archive can be made. For want of space it is tried for ever."""
_EXPANSION: Final = 100
"""How many times as large as an archive may be, its files may be together; the sandbox's disk bounds them as well."""
_NO_SPACE: Final = {errno.ENOSPC, errno.EDQUOT}
VM_REASON: Final = "snapshots of a running machine need microVM isolation; this sandbox is a container"


class HalfRestoredError(HiverError):
    """Part of an archive is in the sandbox, and the rest is not: the sandbox has to be made anew."""


class _Archive(Struct, frozen=True):
    descriptor: int
    spans: list[Span]
    pause_seconds: float


class Snapshots:
    def __init__(
        self,
        *,
        isolation: Isolation,
        stores: SnapshotStores,
        settings: SnapshotsSettings,
        data_dir: Path,
        ready: Callable[[Sandbox], Awaitable[None]],
    ) -> None:
        """`ready` is awaited before a capture: what stands between the sandbox and its mounts is then in order, or it
        raises."""
        self._isolation = isolation
        self._stores = stores
        self._settings = settings
        self._spool = data_dir / "spool"
        self._aside = Aside(data_dir / "snapshots-failed")
        self._ready = ready
        self._queues: dict[str, asyncio.Lock] = {}
        self._tries: dict[str, int] = {}

    # -- on demand ----------------------------------------------------------------------------------------------------

    async def on_demand(self, sandbox: Sandbox, request: SnapshotRequest) -> SnapshotResult:
        """PROTOCOL 3.15. Raises `InvalidError` for a mount that is none, `HiverError` if it fails."""
        vm = files = None
        if request.files is not None:
            plan = snapshot_plan.plan_of(request.files)
            info = await self._captured(sandbox, plan)
            files = SnapshotPartResult(captured=True, key=plan.key, bytes=info.bytes)
        if request.vm is not None:
            vm = SnapshotPartResult(captured=False, key=request.vm.key, reason=VM_REASON)
        return SnapshotResult(vm=vm, files=files)

    async def _captured(self, sandbox: Sandbox, plan: FilesPlan) -> SnapshotInfo:
        async with self._queue(sandbox), self._told(sandbox, "put", plan.key):
            volume = None if sandbox.spec is None else sandbox.spec.volume
            async with (
                self._stores.chosen(sandbox.config, plan.mount, volume) as store,
                self._archived(sandbox, plan, live=True) as archive,
            ):
                info = await store.put(plan.key, content_of(archive.descriptor, archive.spans))
            log.info(
                "sandbox %s: snapshot %s, %d bytes, paused for %.0f ms",
                sandbox.key, plan.key, info.bytes, archive.pause_seconds * 1000,
            )  # fmt: skip
            return info

    # -- at the end ---------------------------------------------------------------------------------------------------

    async def at_end(self, sandbox: Sandbox) -> None:
        """The workload has ended, and nothing of its files has gone yet. May be called again until it returns.

        Raises if there is no archive yet and there may be one later. A store that fails is no reason: the archive is
        kept aside, and `sandbox.end_error` tells.
        """
        plan = snapshot_plan.capture_at_end_of(sandbox.config.snapshot)
        if plan is None or sandbox.spec is None:
            return
        async with self._queue(sandbox):
            try:
                async with self._told(sandbox, "put", plan.key):
                    await self._capture_at_end(sandbox, plan)
            except HiverError as error:
                self._give_up_or_raise(sandbox, error)
        self._tries.pop(sandbox.id, None)
        self._queues.pop(sandbox.id, None)

    async def _capture_at_end(self, sandbox: Sandbox, plan: FilesPlan) -> None:
        async with self._archived(sandbox, plan, live=False) as archive:
            try:
                volume = None if sandbox.spec is None else sandbox.spec.volume
                async with self._stores.chosen(sandbox.config, plan.mount, volume) as store:
                    info = await store.put(plan.key, content_of(archive.descriptor, archive.spans))
            except Exception as error:  # noqa: BLE001 -- logged there; whatever it is, the archive must not be lost
                await self._keep_aside(sandbox, plan, archive, error)
            else:
                log.info("sandbox %s: snapshot %s at its end, %d bytes", sandbox.key, plan.key, info.bytes)

    async def _keep_aside(self, sandbox: Sandbox, plan: FilesPlan, archive: _Archive, error: Exception) -> None:
        reason = error.message if isinstance(error, HiverError) else "the store failed"
        if not isinstance(error, HiverError):
            log.exception("sandbox %s: its snapshot store failed", sandbox.key)
        ending = "tar.gz" if self._settings.compression == "gzip" else "tar.zst"
        about = KeptAside(plan.key, plan.mount, msgspec.Raw(msgspec.json.encode(sandbox.config)), now())
        name = f"{plan.key}~{sandbox.id}~{time.time_ns()}.{ending}"
        try:
            kept = await asyncio.to_thread(self._aside.keep, name, archive.descriptor, archive.spans, about)
        except OSError as failure:
            raise UnavailableError(
                f"snapshot {plan.key} was not stored ({reason}) and cannot be kept aside: {failure.strerror}"
            ) from failure
        sandbox.end_error = f"snapshot {plan.key} was not stored: {reason}; its archive is kept in {kept}"
        raise BackendError(sandbox.end_error)

    def _give_up_or_raise(self, sandbox: Sandbox, error: HiverError) -> None:
        log.error("sandbox %s: %s", sandbox.key, error.message)
        if sandbox.end_error is not None:
            return
        tries = self._tries[sandbox.id] = self._tries.get(sandbox.id, 0) + 1
        if _is_for_want_of_space(error) or tries < CAPTURE_TRIES:
            raise error
        sandbox.end_error = f"the sandbox's last snapshot could not be made: {error.message}"

    async def offer_again(self) -> None:
        """What was kept aside, to the stores that did not take it."""

        async def put(about: KeptAside, store: Callable[[SnapshotStore], Awaitable[None]]) -> None:
            async with self._stores.chosen(
                config_of_document(msgspec.json.decode(about.config)), about.mount, None
            ) as target:
                await store(target)

        await self._aside.offer(put)

    # -- at the beginning ---------------------------------------------------------------------------------------------

    async def restore(self, sandbox: Sandbox) -> None:
        """Between `create` and `begin`. A missing or damaged snapshot is a fresh start (PROTOCOL 3.16).

        Raises `HalfRestoredError` only.
        """
        plan = snapshot_plan.restore_of(sandbox.config.snapshot)
        if plan is None:
            return
        try:
            async with self._told(sandbox, "get", plan.key):
                await self._restored(sandbox, plan)
        except HalfRestoredError:
            raise
        except HiverError as error:
            log.warning("sandbox %s starts afresh, without snapshot %s: %s", sandbox.key, plan.key, error.message)

    async def _restored(self, sandbox: Sandbox, plan: FilesPlan) -> None:
        volume = None if sandbox.spec is None else sandbox.spec.volume
        async with self._stores.chosen(sandbox.config, plan.mount, volume) as store:
            try:
                async with self._stores.fetched(store, plan.key) as fetched, Worker() as worker:
                    await self._restore_from(sandbox, plan, worker, fetched.file.fileno())
            except NotFoundError:
                log.info("sandbox %s: there is no snapshot %s yet", sandbox.key, plan.key)

    async def _restore_from(self, sandbox: Sandbox, plan: FilesPlan, worker: Worker, archive: int) -> None:
        order = RestoreOrder(
            include=list(plan.include),
            excluded=list(snapshot_plan.EXCLUDED),
            max_members=self._settings.max_members,
            max_bytes=(self._settings.max_mib << 20) * _EXPANSION,
        )
        process = sandbox.workload.open_process()
        try:
            root = sandbox.workload.open_root()
            try:
                done = await worker.restore(order, archive, process, root)
            except WorkerFailedError as error:
                if error.failure.touched:
                    raise HalfRestoredError(error.message) from error
                raise
            finally:
                os.close(root)
        finally:
            os.close(process)
        log.info("sandbox %s: %d members of snapshot %s restored", sandbox.key, done.members, plan.key)
        if done.refused:
            log.warning(
                "sandbox %s: %d members of snapshot %s were left out, the first one %s",
                sandbox.key, done.refused, plan.key, done.first_refusal,
            )  # fmt: skip

    # -- archives -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _archived(self, sandbox: Sandbox, plan: FilesPlan, *, live: bool) -> AsyncIterator[_Archive]:
        order = await self._order(sandbox, plan, live=live)
        with await self._spool_file() as spool:

            async def pause(wanted: bool) -> frozenset[int]:
                if wanted:
                    return await sandbox.workload.pause()
                if sandbox.has_workload:
                    await sandbox.workload.resume()
                return frozenset()

            async with Worker() as worker:
                try:
                    captured, paused = await worker.capture(order, spool.fileno(), pause if live else None)
                except WorkerFailedError as error:
                    if error.failure.errno in _NO_SPACE:
                        raise _no_space() from error
                    raise BackendError(f"the sandbox's files could not be captured: {error.message}") from error
            yield _Archive(spool.fileno(), captured.spans, paused)

    async def _spool_file(self) -> FileIO:
        def opened() -> FileIO:
            self._spool.mkdir(mode=0o700, parents=True, exist_ok=True)
            return TemporaryFile(dir=self._spool, buffering=0)

        try:
            return await asyncio.to_thread(opened)
        except OSError as error:
            raise _no_space() if error.errno in _NO_SPACE else BackendError(f"no spool: {error.strerror}") from error

    async def _order(self, sandbox: Sandbox, plan: FilesPlan, *, live: bool) -> CaptureOrder:
        spec = sandbox.spec
        assert spec is not None  # noqa: S101 -- it runs, or has run
        if plan.include:
            await self._ready(sandbox)
        changes = await self._isolation.root_changes(spec, sandbox.isolation_state)
        if changes is None:
            raise UnsupportedError("files cannot be captured with this isolation plug-in", field="files")
        return CaptureOrder(
            parts=snapshot_plan.parts_of(changes, spec.mounts, plan.include),
            include=list(plan.include),
            excluded=list(snapshot_plan.EXCLUDED),
            compression=self._settings.compression,
            level=self._settings.compression_level,
            threads=max(2, min(4, os.cpu_count() or 1)),
            max_bytes=self._settings.max_mib << 20,
            max_members=self._settings.max_members,
            live=live,
        )

    # -- small things -------------------------------------------------------------------------------------------------

    def _queue(self, sandbox: Sandbox) -> asyncio.Lock:
        """One capture of a sandbox at a time."""
        return self._queues.setdefault(sandbox.id, asyncio.Lock())

    def forget(self, sandbox_id: str) -> None:
        """The sandbox is gone."""
        self._queues.pop(sandbox_id, None)
        self._tries.pop(sandbox_id, None)

    @asynccontextmanager
    async def _told(self, sandbox: Sandbox, operation: str, key: str) -> AsyncIterator[None]:
        """An error is an event. A success is none: clients up to 0.1.43 do not know this type and stop at it."""
        started = time.monotonic()
        try:
            yield
        except HiverError as error:
            request = SystemFsSyncRequestEvent("local", "put" if operation == "put" else "get", f"snapshot-{key}")
            number = sandbox.events.emit(request)
            duration_ms = int((time.monotonic() - started) * 1000)
            sandbox.events.emit(SystemFsSyncResponseEvent(number, duration_ms, error.message))
            raise


def _no_space() -> UnavailableError:
    return UnavailableError("the server's disk is full: there is no room for an archive of the sandbox's files")


def _is_for_want_of_space(error: HiverError) -> bool:
    return isinstance(error, UnavailableError)
