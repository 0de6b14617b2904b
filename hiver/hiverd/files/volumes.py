"""A folder of its own on bounded disk for every sandbox, with a few prepared ahead (DESIGN 3)."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, Literal, TypeVar

from hiverd.contracts.errors import HiverError, UnavailableError
from hiverd.contracts.isolation import Finding
from hiverd.files import ext4
from hiverd.files.volume_store import Kind, VolumeStore

log = logging.getLogger(__name__)

T = TypeVar("T")

GIB: Final = 1 << 30
_MINIMUM_DISK_BYTES: Final = 64 << 20
_RETRY_SECONDS: Final = 5.0
_SPARSE_FRACTION: Final = 8


class Volumes:
    """Hands out volumes: folders with `root/` and `mounts/`, mode 0700.

    What fills one up gets ENOSPC there and nowhere else. `data_dir` is private to this server. Life: `start`, then
    `adopt` or `release` for everything that `list_owned` names, then `allocate` and `release`, then `close`.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        kind: Literal["auto", "loop", "plain"] = "auto",
        disk_bytes: int = 10 * GIB,
        warm: int = 4,
        reserve_bytes: int = 2 * GIB,
    ) -> None:
        """`disk_bytes`: what one sandbox may use. `warm`: volumes kept ready. `reserve_bytes`: free space of the host's
        disk below which no sandbox is created."""
        self._base = data_dir
        self._kind: Literal["auto", "loop", "plain"] = kind
        self._disk_bytes = max(disk_bytes, _MINIMUM_DISK_BYTES) // 4096 * 4096
        self._warm = warm
        self._reserve_bytes = reserve_bytes
        self._store = VolumeStore(data_dir, "plain", self._disk_bytes)
        workers = min(8, 2 * (os.cpu_count() or 1) + 2)
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="volumes")
        self._ready: deque[str] = deque()
        self._allocating: dict[str, asyncio.Task[Path]] = {}
        self._building = 0
        self._closed = False
        self._changed = asyncio.Event()
        # Set when `_ready` or `_building` got smaller.
        self._refilling: asyncio.Task[None] | None = None
        self.findings: tuple[Finding, ...] = ()
        """What `start` found about this host."""

    async def start(self) -> None:
        """Chooses the kind, removes what no sandbox owns, begins to prepare volumes.

        Raises `UnavailableError` if `kind` is `loop` and this host cannot.
        """
        await self._run(self._choose)
        owned = set((await self._run(self._store.owners)).values())
        existing = await self._run(self._store.existing)
        await self._discard_all(existing - owned)
        self._refilling = asyncio.create_task(self._refill(), name="volumes:refill")

    @property
    def separate(self) -> bool:
        """Whether each volume is a file system of its own."""
        return self._store.kind == "loop"

    async def probe(self) -> list[Finding]:
        """What this host offers, for `hiver doctor`: builds a volume and removes it again."""
        return [await self._run(lambda: probe_volumes(self._base))]

    async def allocate(self, sandbox_id: str, slot: int) -> Path:
        """The sandbox's volume; the same one if it has one already.

        Raises `UnavailableError` when the host's disk is nearly full. A caller that is cancelled still may have got a
        volume: `release` it.
        """
        task = self._allocating.get(sandbox_id)
        if task is None:
            task = asyncio.create_task(self._allocate(sandbox_id), name=f"volumes:allocate-{sandbox_id}")
            self._allocating[sandbox_id] = task
            task.add_done_callback(lambda done: self._allocated(sandbox_id, done))
        return await asyncio.shield(task)

    def _allocated(self, sandbox_id: str, task: asyncio.Task[Path]) -> None:
        self._allocating.pop(sandbox_id, None)
        if not task.cancelled():
            task.exception()  # told to whoever still waits

    async def _allocate(self, sandbox_id: str) -> Path:
        owned = self._store.owned(sandbox_id)
        if owned is not None:
            return self._store.folder(owned)
        self._require_space()
        if self._ready:
            volume_id = self._ready.popleft()
        else:
            volume_id = await self._build()
        try:
            self._store.own(sandbox_id, volume_id)
        except BaseException:
            self._ready.append(volume_id)
            raise
        self._changed.set()
        return self._store.folder(volume_id)

    async def _build(self) -> str:
        self._building += 1
        try:
            return await self._run(self._store.build)
        except OSError as error:
            raise UnavailableError(f"cannot make a volume: {error.strerror or error}") from error
        finally:
            self._building -= 1
            self._changed.set()

    def _require_space(self) -> None:
        free = _free_bytes(self._base)
        if free < self._reserve_bytes:
            raise UnavailableError(
                f"the host's disk is nearly full: {free >> 20} MiB are free and {self._reserve_bytes >> 20} MiB are"
                " kept in reserve"
            )

    async def release(self, sandbox_id: str) -> None:
        """Removes the sandbox's volume and its contents. Idempotent. Raises OSError if something cannot be removed."""
        task = self._allocating.get(sandbox_id)
        if task is not None:
            await asyncio.wait([task])
        volume_id = self._store.owned(sandbox_id)
        if volume_id is None:
            return
        await self._run(lambda: self._store.discard(volume_id))
        self._store.disown(sandbox_id)

    async def list_owned(self) -> frozenset[str]:
        """Ids of the sandboxes that have a volume."""
        return frozenset(await self._run(self._store.owners))

    async def adopt(self, sandbox_id: str) -> Path | None:
        """The volume that an earlier server gave to this sandbox; None if there is none any more."""
        volume_id = await self._run(lambda: self._store.owned(sandbox_id))
        if volume_id is None:
            return None
        try:
            return await self._run(lambda: self._store.revive(volume_id))
        except OSError as error:
            log.warning("volume of sandbox %s cannot be mounted: %s", sandbox_id, error)
            return None

    async def close(self, remove_all: bool = False) -> None:
        """Stops preparing and removes what is ready; with `remove_all` the sandboxes' volumes too.

        Final: a second call does nothing.
        """
        if self._closed:
            return
        self._closed = True
        if self._refilling is not None:
            self._refilling.cancel()
            await asyncio.wait([self._refilling])
            self._refilling = None
        if self._allocating:
            await asyncio.wait(list(self._allocating.values()))
        await self._discard_all(self._ready)
        self._ready.clear()
        if remove_all:
            for sandbox_id in await self.list_owned():
                await self.release(sandbox_id)
        await asyncio.to_thread(self._executor.shutdown)

    # -- preparing ahead ----------------------------------------------------------------------------------------------

    async def _refill(self) -> None:
        """Keeps volumes ready, one at a time, and steps back while somebody waits for one that is being built."""
        while True:
            if self._building or len(self._ready) >= self._warm:
                self._changed.clear()
                await self._changed.wait()
                continue
            try:
                self._require_space()
                await self._build_ready()
            except (OSError, HiverError) as error:
                log.warning("cannot prepare a volume: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)

    async def _build_ready(self) -> None:
        """Builds one; a cancellation meanwhile does not lose it."""
        building = asyncio.ensure_future(self._run(self._store.build))
        try:
            self._ready.append(await asyncio.shield(building))
        except asyncio.CancelledError:
            await asyncio.wait([building])
            if building.exception() is None:
                self._ready.append(building.result())
            raise

    async def _discard_all(self, volume_ids: Iterable[str]) -> None:
        results = await asyncio.gather(
            *(self._run(partial(self._store.discard, volume_id)) for volume_id in volume_ids),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, BaseException):
                log.error("a volume could not be removed: %s", result)

    async def _run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    # -- probing ------------------------------------------------------------------------------------------------------

    def _choose(self) -> None:
        self._base.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in self._base.glob("probe-*"):
            _remove_probe(leftover)
        finding = probe_volumes(self._base)
        self.findings = (finding,)
        if self._kind == "plain":
            kind: Kind = "plain"
        elif finding.ok:
            kind = "loop"
        elif self._kind == "loop":
            raise UnavailableError(f"volumes of kind loop do not work here: {finding.detail}. {finding.remedy}")
        else:
            kind = "plain"
            log.warning("%s: %s. %s", finding.name, finding.detail, finding.remedy)
        self._store = VolumeStore(self._base, kind, self._bounded_bytes())
        self._store.prepare()

    def _bounded_bytes(self) -> int:
        """The size of one volume: less than wished for where even one full sandbox would fill the host's disk."""
        spare = max(_free_bytes(self._base) - self._reserve_bytes, GIB)
        return self._disk_bytes if spare >= self._disk_bytes else spare // GIB * GIB


def probe_volumes(data_dir: Path) -> Finding:
    """Whether disks of sandboxes can be bounded here: builds a small volume and removes it again. Blocks."""
    name = "bounded disks"
    problem, remedy = _probe_problem(data_dir)
    if problem is None:
        return Finding(name, ok=True, detail="ext4 images on loop devices", required=False)
    detail = f"a sandbox can fill the host's disk: {problem}"
    return Finding(name, ok=False, detail=detail, required=False, remedy=remedy)


def _probe_problem(data_dir: Path) -> tuple[str | None, str]:
    """What is missing for volumes of kind loop, and what helps."""
    if os.geteuid() != 0:
        return "mounting images needs root", "Run the server as root."
    if ext4.mkfs_program() is None:
        return "mkfs.ext4 is not installed", "Install the package e2fsprogs."
    if not os.path.exists("/dev/loop-control"):
        return "there is no /dev/loop-control", "Load the module: modprobe loop."
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="probe-", dir=data_dir))
    store = VolumeStore(folder, "loop", _MINIMUM_DISK_BYTES)
    try:
        store.prepare()
        volume_id = store.build()
        sparse = store.used_bytes(volume_id) < _MINIMUM_DISK_BYTES // _SPARSE_FRACTION
        store.discard(volume_id)
    except (OSError, UnavailableError) as error:
        return f"an image cannot be mounted ({error})", "Allow loop mounts, or accept disks without a limit."
    finally:
        _remove_probe(folder)
    if not sparse:
        return "the data folder's file system has no sparse files", "Put the data folder on ext4, xfs or btrfs."
    return None, ""


def _remove_probe(folder: Path) -> None:
    try:
        store = VolumeStore(folder, "loop", _MINIMUM_DISK_BYTES)
        for volume_id in store.existing():
            store.discard(volume_id)
    except OSError as error:
        log.warning("%s cannot be removed: %s", folder, error)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _free_bytes(folder: Path) -> int:
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize
