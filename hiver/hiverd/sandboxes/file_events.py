"""Accesses of native mounts on record: who is watched, and how what was seen gets into the journal (PROTOCOL 6.3)."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from hiverd.contracts.errors import UnavailableError
from hiverd.contracts.isolation import Finding
from hiverd.files import fanotify
from hiverd.files.paths import shown
from hiverd.files.watch import Watch, Watcher
from hiverd.files.watch_pairs import Access
from hiverd.files.watch_places import Folders
from hiverd.sandboxes.sandbox import Sandbox
from hiverd.wire.events import FsRequestEvent, FsResponseEvent

log = logging.getLogger(__name__)

TURN_PAIRS: Final = 128
"""How many pairs go to the journal before the event loop does something else: half a millisecond."""
REST: Final = 8.0
"""How many times as long as a turn took nothing is emitted, unless somebody waits: a flood gets a ninth of the loop."""
FLUSH_SECONDS: Final = 2.0
"""How long a reader of events or the end of a sandbox waits for accesses that are still on their way."""
TOLD_SECONDS: Final = 10.0


class FileEvents:
    """All watches of this server. Life: `start`, then `follow` and `release`, then `close`."""

    def __init__(self, volumes: Path) -> None:
        """`volumes`: the folder that holds all volumes."""
        self._live = volumes / "live"
        self._watcher: Watcher | None = None
        self._followed: dict[str, _Followed] = {}
        self._wake = asyncio.Event()
        self._progress = asyncio.Event()
        self._hurried = 0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Finds out whether the kernel tells about accesses; where it does not, nothing is `watchable`."""
        loop = asyncio.get_running_loop()
        finding = await asyncio.to_thread(probe, self._live if self._live.is_dir() else Path("/"))
        if not finding.ok:
            log.warning("%s: %s. %s", finding.name, finding.detail, finding.remedy)
            return
        self._watcher = Watcher(partial(loop.call_soon_threadsafe, self._wake.set))
        self._task = asyncio.create_task(self._record(), name="file-events")

    @property
    def watching(self) -> bool:
        """Whether the kernel tells about accesses at all."""
        return self._watcher is not None

    def watchable(self, source: Path) -> bool:
        """Whether accesses of a native mount of this folder come on record. It need not exist.

        They do where the folder lies on a file system of the sandbox's own, as that is watched as a whole. A file
        system that others use too would tell about all of them, and a mount or an inode does not tell about removed
        and renamed entries: so plain volumes and folders of the operator (`origin`) are not watchable.
        """
        if self._watcher is None:
            return False
        try:
            volume = self._live / source.relative_to(self._live).parts[0]
            return os.stat(volume).st_dev != os.stat(self._live).st_dev
        except (ValueError, IndexError, OSError):
            return False

    async def follow(self, sandbox: Sandbox) -> None:
        """Puts the sandbox's mounts and its `events` filter in force. Raises `UnavailableError`.

        Nothing is watched while the filter leaves file events out.
        """
        folders = self._folders(sandbox)
        wanted = sandbox.events.wants(FsRequestEvent) or sandbox.events.wants(FsResponseEvent)
        followed = self._followed.get(sandbox.id)
        if self._watcher is None or sandbox.spec is None:
            return
        if not folders or not wanted:
            await self._leave(sandbox.id)
            return
        if followed is not None:
            await self._watcher.change(followed.watch, folders)
            return
        try:
            watch = await self._watcher.add(sandbox.spec.volume, folders)
        except OSError as error:
            raise UnavailableError(f"accesses of files cannot be watched: {error.strerror}") from error
        self._followed[sandbox.id] = _Followed(sandbox, watch)
        sandbox.events.before_flush["native"] = lambda: self.flush(sandbox.id)

    def _folders(self, sandbox: Sandbox) -> Folders:
        if sandbox.spec is None:
            return {}
        place = sandbox.spec.volume / "mounts"
        return {
            os.fsencode(Path(mount.source).name): (mount.target, os.fsencode(mount.target))
            for mount in sandbox.spec.mounts
            if Path(mount.source).parent == place and self.watchable(Path(mount.source))
        }

    async def release(self, sandbox_id: str) -> None:
        """Records what is left and lets go of the volume, which can be unmounted then. Idempotent."""
        await self._leave(sandbox_id)

    async def _leave(self, sandbox_id: str) -> None:
        followed = self._followed.get(sandbox_id)
        if followed is None or self._watcher is None:
            return
        if not followed.leaving:
            followed.leaving = True
            await self._watcher.remove(followed.watch)
        await self._drain([followed])
        self._followed.pop(sandbox_id, None)
        followed.forget()

    async def flush(self, sandbox_id: str) -> None:
        """The sandbox's accesses before this call are with the journal when it returns, or `FLUSH_SECONDS` have
        passed."""
        followed = self._followed.get(sandbox_id)
        if followed is not None:
            await self._flush([followed])

    async def _flush(self, followed: list[_Followed]) -> None:
        if self._watcher is None or not followed:
            return
        try:
            async with asyncio.timeout(FLUSH_SECONDS):
                await self._watcher.flush()
        except (TimeoutError, UnavailableError):
            log.warning("file events: the kernel's queue is not read yet")
        else:
            await self._drain(followed)

    async def _drain(self, followed: list[_Followed]) -> None:
        """Waits for what is pending now, and not for what follows."""
        goals = [(each, each.goal) for each in followed]
        try:
            async with asyncio.timeout(FLUSH_SECONDS):
                with self._hurry():
                    self._wake.set()
                    while any(each.emitted < goal for each, goal in goals):
                        self._progress.clear()
                        await self._progress.wait()
        except TimeoutError:
            log.warning("file events: some are not on record yet")

    @contextmanager
    def _hurry(self) -> Iterator[None]:
        self._hurried += 1
        try:
            yield
        finally:
            self._hurried -= 1

    async def close(self) -> None:
        """The server stops: what happened until now goes on record."""
        await self._flush(list(self._followed.values()))
        if self._watcher is not None:
            await self._watcher.close()
            self._watcher = None
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    # -- recording ----------------------------------------------------------------------------------------------------

    async def _record(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while busy := [followed for followed in self._followed.values() if followed.collect()]:
                for followed in busy:
                    await followed.sandbox.events.room()
                    began = loop.time()
                    followed.emit()
                    self._progress.set()
                    rest = 0.0 if self._hurried else REST * (loop.time() - began)
                    await asyncio.sleep(rest)


class _Followed:
    """A sandbox whose volume is watched."""

    def __init__(self, sandbox: Sandbox, watch: Watch) -> None:
        self.sandbox = sandbox
        self.watch = watch
        self.leaving = False
        self.emitted = 0
        self._taken: list[Access] = []
        self._next = 0
        self._coarse = 0
        self._unplaced = 0
        self._quiet_until = 0.0

    @property
    def goal(self) -> int:
        """What `emitted` will be when all that is pending now has been."""
        return self.emitted + len(self._taken) - self._next + len(self.watch.pending)

    def forget(self) -> None:
        self.watch.pending.told(self._taken)
        self.watch.pending.told(self.watch.pending.take())
        self._taken, self._next = [], 0
        self.sandbox.events.before_flush.pop("native", None)

    def collect(self) -> bool:
        """Whether there is something to emit."""
        if self._next < len(self._taken):
            return True
        self.watch.pending.told(self._taken)
        self._taken, self._next = self.watch.pending.take(), 0
        return bool(self._taken)

    def emit(self) -> None:
        """A turn's worth of pairs."""
        turn = self._taken[self._next : self._next + TURN_PAIRS]
        accesses = [(operation, mount, shown(path)) for operation, mount, path in turn]
        self.sandbox.events.emit_accesses("local", accesses)
        self._next += len(turn)
        self.emitted += len(turn)
        self._tell()

    def _tell(self) -> None:
        """What is less exact than it should be goes to the log, now and then."""
        self._coarse += self.watch.pending.take_coarse()
        unplaced = self.watch.unplaced - self._unplaced
        now = asyncio.get_running_loop().time()
        if now < self._quiet_until or not (self._coarse or unplaced):
            return
        self._quiet_until = now + TOLD_SECONDS
        if self._coarse:
            log.warning(
                "sandbox %s: %d accesses of files are on record by their folder or mount only: too many at once",
                self.sandbox.key,
                self._coarse,
            )
        if unplaced:
            log.warning(
                "sandbox %s: %d accesses are on record in the mount's root, as their folder was gone too soon",
                self.sandbox.key,
                unplaced,
            )
        self._coarse, self._unplaced = 0, self.watch.unplaced


def probe(folder: Path) -> Finding:
    """Whether the kernel tells about accesses of native mounts, for `hiver doctor`. Blocks."""
    name = "file events"
    problem = fanotify.problem(folder)
    if problem is None:
        return Finding(name, ok=True, detail="by fanotify: open local mounts at native speed", required=False)
    detail = f"open local mounts are served as governed ones, which is slower: {problem}"
    remedy = "Run the server as root, with CAP_SYS_ADMIN and CAP_DAC_READ_SEARCH, on Linux 5.9 or later."
    return Finding(name, ok=False, detail=detail, required=False, remedy=remedy)
