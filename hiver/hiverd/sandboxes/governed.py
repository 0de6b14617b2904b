"""All governed mounts of this server: started, taken over after a restart, changed, ended, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from hiverd.contracts.errors import HiverError
from hiverd.contracts.isolation import Mount
from hiverd.fuse.frames import Begin, RemoteOptions
from hiverd.sandboxes.mount_events import MountRecorder, UploadListener
from hiverd.sandboxes.mount_server import MountServer, remove_run_folder
from hiverd.sandboxes.mounts import PlannedMount
from hiverd.sandboxes.sandbox import Sandbox
from hiverd.sandboxes.tasks import TaskGroup
from hiverd.wire.events import FsRequestEvent, FsResponseEvent

log = logging.getLogger(__name__)

BEGIN_FILE: Final = "mount"
"""In a remote mount's folder: what its server was told, so that another one can go on with the uploads."""
PROGRESS_SECONDS: Final = 2.0
FLUSH_SECONDS: Final = 2.0
RESUME_SECONDS: Final = 1.0
"""Before another process goes on with the uploads of one that died."""


class GovernedMounts:
    """`run_dir`: sockets and mount points, `<sandbox>/<mount>/`. `data_dir`: copies of remote mounts, likewise."""

    def __init__(
        self, run_dir: Path, data_dir: Path, remote: RemoteOptions, drain_seconds: float, tasks: TaskGroup
    ) -> None:
        self._run_dir = run_dir
        self._data_dir = data_dir
        self._remote = remote
        self._drain_seconds = drain_seconds
        self._tasks = tasks
        self._servers: dict[str, dict[str, MountServer]] = {}
        self._finishing: set[MountServer] = set()
        self._resuming: set[Path] = set()
        self._closing = False
        self.on_lost: Callable[[str, str], None] | None = None
        """Called with a sandbox's id and a mount path when the process behind that mount has ended by itself."""

    # -- one mount --------------------------------------------------------------------------------------------------

    async def start(
        self, sandbox: Sandbox, planned: PlannedMount, folder: Path, again: Mount | None = None
    ) -> tuple[MountServer, Mount]:
        """A new mount server, not yet the one in force. Raises `HiverError`.

        `folder`: the local data. `again`: the mount of a server that died, whose copy of remote data goes on.
        """
        name = secrets.token_hex(6) if again is None else Path(again.source).parent.name
        server = self._server(sandbox, planned, name)
        copy = self._data_dir / sandbox.id / name
        begin = self._begin(sandbox, planned, folder, copy, server.mountpoint, check=again is None)
        if planned.remote:
            await asyncio.to_thread(_store, Path(begin.folder), begin)
        try:
            await server.start(begin)
        except BaseException:
            if planned.remote and again is None:
                await asyncio.to_thread(_forget, Path(begin.folder))
            raise
        return server, Mount(target=planned.target, source=str(server.mountpoint))

    def use(self, sandbox_id: str, target: str, server: MountServer) -> None:
        """Puts a server in force."""
        self._servers.setdefault(sandbox_id, {})[target] = server

    def take(self, sandbox_id: str, target: str) -> MountServer | None:
        """Puts it out of force; the caller ends it."""
        return self._servers.get(sandbox_id, {}).pop(target, None)

    def is_served(self, sandbox_id: str, target: str) -> bool:
        """Whether a process of ours is behind that mount, as far as is known."""
        server = self.find(sandbox_id, target)
        return server is not None and not server.ended.is_set()

    def find(self, sandbox_id: str, target: str) -> MountServer | None:
        return self._servers.get(sandbox_id, {}).get(target)

    async def adopt(self, sandbox: Sandbox, planned: PlannedMount, mount: Mount) -> bool:
        """Takes over what an earlier server started. False if it is not served any more."""
        folder = Path(mount.source).parent
        if folder.parent != self._run_dir / sandbox.id:
            return False
        server = self._server(sandbox, planned, folder.name)
        if not await server.adopt(planned.rules, is_recording(sandbox)):
            return False
        self.use(sandbox.id, planned.target, server)
        return True

    async def discard(self, sandbox: Sandbox, mount: Mount) -> None:
        """Ends the process behind a mount, dead or not; what it keeps of remote data stays."""
        folder = Path(mount.source).parent
        server = self.find(sandbox.id, mount.target)
        if server is not None and server.folder == folder:
            self.take(sandbox.id, mount.target)
            await server.discard()
        elif folder.parent == self._run_dir / sandbox.id:
            await asyncio.to_thread(remove_run_folder, folder)

    async def change(self, sandbox: Sandbox, before: PlannedMount, planned: PlannedMount) -> None:
        """New rules or credentials, in force when this returns. Raises `HiverError`; then it is as before."""
        server = self.find(sandbox.id, planned.target)
        if server is None:
            return
        entry = planned.entry if planned.remote and before.entry != planned.entry else None
        await server.change(planned.rules, is_recording(sandbox), entry)
        if planned.remote:
            folder = self._data_dir / sandbox.id / server.folder.name
            await asyncio.to_thread(_store_entry, folder, planned)

    async def set_recording(self, sandbox: Sandbox) -> None:
        """After a change of the sandbox's `events`."""
        recording = is_recording(sandbox)
        for target, server in self._servers.get(sandbox.id, {}).items():
            try:
                await server.set_recording(recording)
            except HiverError as error:
                log.error("sandbox %s: events of mount %s are as before: %s", sandbox.key, target, error.message)

    async def end(self, server: MountServer, planned: PlannedMount) -> None:
        """The mount goes now; what is pending of a remote one is uploaded later, for as long as it takes."""
        if not planned.remote:
            await server.quit()
            return
        await server.finish()
        self._follow(server)

    def _server(self, sandbox: Sandbox, planned: PlannedMount, name: str) -> MountServer:
        def lost(server: MountServer) -> None:
            if self.find(sandbox.id, planned.target) is server and self.on_lost is not None:
                self.on_lost(sandbox.id, planned.target)

        sandbox.events.before_flush["governed"] = partial(self.flush, sandbox.id)
        recorder = MountRecorder(sandbox, planned.target, planned.backend, self._tasks)
        return MountServer(self._run_dir / sandbox.id / name, planned.field, recorder, lost)

    def _begin(
        self, sandbox: Sandbox, planned: PlannedMount, folder: Path, copy: Path, mountpoint: Path, *, check: bool
    ) -> Begin:
        return Begin(
            number=0,
            server_pid=os.getpid(),
            mount=planned.target,
            backend=planned.backend,
            entry=planned.entry,
            rules=list(planned.rules),
            folder=str(copy if planned.remote else folder),
            mountpoint=str(mountpoint),
            recording=is_recording(sandbox),
            operators=planned.origin is not None,
            check=check and not planned.entry.get("async"),
            remote=self._remote if planned.remote else None,
        )

    async def flush(self, sandbox_id: str) -> None:
        """The accesses before this call are with the journal when it returns, or `FLUSH_SECONDS` have passed."""
        servers = list(self._servers.get(sandbox_id, {}).values())
        await asyncio.gather(*(server.hand_over(FLUSH_SECONDS) for server in servers))

    # -- all mounts of a sandbox ------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def cut_after(self, sandbox_id: str, seconds: float) -> AsyncIterator[None]:
        """Around the end of a workload: a process that waits for a service cannot be killed while it waits, so after
        this time its mounts are cut off. What is pending is uploaded afterwards."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(seconds, self._cut, sandbox_id)
        try:
            yield
        finally:
            timer.cancel()

    def _cut(self, sandbox_id: str) -> None:
        for target, server in self._servers.get(sandbox_id, {}).items():
            log.warning("sandbox %s: mount %s is cut off, since its users do not end", sandbox_id, target)
            server.kill()

    async def release(self, sandbox_id: str) -> None:
        """The sandbox is gone: its mounts go. Waits a while for what is pending, and leaves the rest to the background.

        Idempotent, and works for sandboxes that this server never saw.
        """
        servers = self._servers.pop(sandbox_id, {})
        await asyncio.gather(*(self._finish(server) for server in servers.values()))
        await self._drain(sandbox_id, [server for server in servers.values() if server in self._finishing])
        await asyncio.to_thread(self._remove_unknown, sandbox_id)
        await self.resume({sandbox_id})

    async def _finish(self, server: MountServer) -> None:
        if (self._data_dir / server.folder.parent.name / server.folder.name).is_dir():
            await server.finish()
            self._follow(server)
        else:
            await server.quit()

    async def _drain(self, sandbox_id: str, servers: list[MountServer]) -> None:
        deadline = asyncio.get_running_loop().time() + self._drain_seconds
        waiting = {asyncio.ensure_future(server.ended.wait()) for server in servers}
        while waiting and (left := deadline - asyncio.get_running_loop().time()) > 0:
            _, waiting = await asyncio.wait(waiting, timeout=min(left, PROGRESS_SECONDS))
            files = sum(server.listener.pending for server in servers if not server.ended.is_set())
            if waiting and files:
                log.info("sandbox %s: %d files are still to be uploaded", sandbox_id, files)
        for task in waiting:
            task.cancel()
        if waiting:
            log.warning("sandbox %s has ended; its uploads go on in the background", sandbox_id)

    def _follow(self, server: MountServer) -> None:
        self._finishing.add(server)
        self._tasks.start(self._await_end(server), name=f"uploads-{server.folder.name}")

    async def _await_end(self, server: MountServer) -> None:
        try:
            await server.ended.wait()
        finally:
            self._finishing.discard(server)
        await server.discard()
        copy = self._data_dir / server.folder.parent.name / server.folder.name
        while copy.is_dir() and not self._closing:  # it died before it was done
            await asyncio.sleep(RESUME_SECONDS)
            await self.resume({copy.parent.name})
            if any(other.folder == server.folder for other in self._finishing):
                return
        with contextlib.suppress(OSError):
            copy.parent.rmdir()

    def _remove_unknown(self, sandbox_id: str) -> None:
        """Run folders that belong to no server of ours."""
        known = {server.folder for server in self._finishing}
        known |= {server.folder for server in self._servers.get(sandbox_id, {}).values()}
        for folder in _subfolders(self._run_dir / sandbox_id):
            if folder not in known:
                remove_run_folder(folder)
        with contextlib.suppress(OSError):
            (self._run_dir / sandbox_id).rmdir()

    # -- the whole server -------------------------------------------------------------------------------------------

    async def resume(self, sandbox_ids: set[str]) -> None:
        """Goes on with the uploads of sandboxes that are gone."""
        for sandbox_id in sandbox_ids:
            for folder in await asyncio.to_thread(_subfolders, self._data_dir / sandbox_id):
                busy = {server.folder.name for server in self._finishing}
                if folder.name in busy or folder in self._resuming or self._is_in_use(sandbox_id, folder.name):
                    continue
                self._resuming.add(folder)
                try:
                    await self._resume_one(sandbox_id, folder)
                finally:
                    self._resuming.discard(folder)

    def _is_in_use(self, sandbox_id: str, name: str) -> bool:
        return any(server.folder.name == name for server in self._servers.get(sandbox_id, {}).values())

    async def _resume_one(self, sandbox_id: str, folder: Path) -> None:
        begin = await asyncio.to_thread(_load, folder)
        if begin is None:
            await asyncio.to_thread(_forget, folder)
            return
        listener = UploadListener(f"sandbox {sandbox_id}, mount {begin.mount}")
        server = MountServer(self._run_dir / sandbox_id / folder.name, "fs", listener, lambda _: None)
        try:
            await server.start(msgspec.structs.replace(begin, mountpoint=None, remote=self._remote))
        except HiverError as error:
            log.error("sandbox %s: what it left to upload stays in %s: %s", sandbox_id, folder, error.message)
            return
        log.info("sandbox %s, mount %s: uploading what it left", sandbox_id, begin.mount)
        self._follow(server)

    async def list_owned(self) -> frozenset[str]:
        """Ids of all sandboxes of which a mount is left, those apart of which only uploads are."""
        busy = {server.folder.parent.name for server in self._finishing}
        found = await asyncio.to_thread(lambda: {folder.name for folder in _subfolders(self._run_dir)})
        return frozenset(found - busy)

    async def left_behind(self, owned: frozenset[str]) -> set[str]:
        """Ids of sandboxes that are gone and left something to upload."""
        found = await asyncio.to_thread(lambda: {folder.name for folder in _subfolders(self._data_dir)})
        return found - owned

    async def close(self) -> None:
        """The server stops: mounts go on; uploads of sandboxes that are gone stop, and go on with the next start."""
        self._closing = True
        servers = [server for mounts in self._servers.values() for server in mounts.values()]
        await asyncio.gather(*(server.leave() for server in servers))
        for server in list(self._finishing):
            if server.listener.pending:
                log.warning("%d files are still to be uploaded; the next start goes on", server.listener.pending)
            await server.quit()


def is_recording(sandbox: Sandbox) -> bool:
    return sandbox.events.wants(FsRequestEvent) or sandbox.events.wants(FsResponseEvent)


def _subfolders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir()]
    except FileNotFoundError:
        return []


def _store(folder: Path, begin: Begin) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = folder / f".{BEGIN_FILE}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(msgspec.msgpack.encode(begin))
    temporary.rename(folder / BEGIN_FILE)


def _store_entry(folder: Path, planned: PlannedMount) -> None:
    begin = _load(folder)
    if begin is not None:
        _store(folder, msgspec.structs.replace(begin, entry=planned.entry, rules=list(planned.rules)))


def _load(folder: Path) -> Begin | None:
    """None: nothing was begun there."""
    try:
        return msgspec.msgpack.decode((folder / BEGIN_FILE).read_bytes(), type=Begin)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def _forget(folder: Path) -> None:
    """Removes what was kept for a mount that was never served, or of which everything is uploaded."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()
