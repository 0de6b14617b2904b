"""What a mount server serves: the FUSE mount, and behind a remote one the folder that is kept like its backend."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

from msgspec import Struct

from hiverd import plugins
from hiverd.contracts.errors import HiverError, InvalidError, UnsupportedError
from hiverd.contracts.filesystem import FileSystem
from hiverd.files.acl import Rules
from hiverd.files.paths import shown
from hiverd.fuse.attributes import FolderOwner
from hiverd.fuse.frames import Access, Begin, Change, Failure, FailureKind, RemoteOptions, SyncBegan, SyncEnded
from hiverd.fuse.judge import FsAccess, ServerProcess
from hiverd.fuse.mount import FuseMount
from hiverd.fuse.outbox import Outbox
from hiverd.remote.calls import SyncCall
from hiverd.remote.folder import RemoteFolder
from hiverd.remote.settings import RemoteSettings
from hiverd.wire.model import AclRule

log = logging.getLogger(__name__)

CHECK_SECONDS: Final = 30.0
"""For the first question to a service."""


class Backlog(Struct, frozen=True):
    files: int = 0
    size_bytes: int = 0


async def ask_something(backend: FileSystem) -> None:
    """Something that only works if everything does: a wrong bucket or key is told now and not to the agent."""
    async with asyncio.timeout(CHECK_SECONDS):
        await backend.stat("/")
        async for _ in backend.list_directory("/"):
            break


_TOLD: Final[tuple[tuple[type[OSError], FailureKind, str], ...]] = (
    (PermissionError, "refused", "the service refuses the credentials: "),
    (FileNotFoundError, "missing", "the service knows no such place: "),
    (TimeoutError, "unreachable", "the service does not answer in time: "),
    (OSError, "unreachable", "the service cannot be used: "),
)


def failure_of(error: Exception) -> Failure:
    """What the caller is told. Messages of plug-ins hold no credentials (contracts/filesystem.py)."""
    if isinstance(error, InvalidError):
        kind: FailureKind = "unsupported" if isinstance(error, UnsupportedError) else "invalid"
        return Failure(kind, error.message, error.field)
    if isinstance(error, HiverError):
        return Failure("internal", error.message)
    for cls, kind, text in _TOLD:
        if isinstance(error, cls):
            return Failure(kind, text + (error.strerror or os.strerror(error.errno or errno.EIO)))
    log.error("a question of the server failed", exc_info=error)
    return Failure("internal", "the mount's process failed; its log has the reason")


class Serving:
    """One mount. All methods belong to the event loop."""

    def __init__(self, begin: Begin, outbox: Outbox) -> None:
        self.server = ServerProcess(begin.server_pid)
        self.mount = begin.mount
        self.lost = asyncio.Event()
        """Set when the kernel has ended the mount unasked."""
        self._begin = begin
        self._outbox = outbox
        self._loop = asyncio.get_running_loop()
        self._case_sensitive = True
        self._changed: SimpleQueue[str | None] = SimpleQueue()
        self._backend: FileSystem | None = None
        self._remote: RemoteFolder | None = None
        self._fuse: FuseMount | None = None

    async def start(self) -> None:
        """Raises what is wrong; then the caller closes."""
        begin = self._begin
        folder = Path(begin.folder)
        if begin.remote is not None:
            folder = await self._open_remote(folder, begin.remote)
        if begin.mountpoint is not None:
            await asyncio.to_thread(self._mount, folder, Path(begin.mountpoint))

    def _mount(self, folder: Path, mountpoint: Path) -> None:
        begin = self._begin
        fuse = FuseMount(
            folder,
            rules=self._rules(begin.rules),
            record=self._record if begin.recording else None,
            exempt=self.server,
            content=self._remote,
            owners=_owner_of(folder) if begin.operators else None,
            shared=begin.operators,
        )
        self._fuse = fuse
        fuse.start(mountpoint)
        threading.Thread(target=self._watch, args=(fuse,), name="end-of-mount", daemon=True).start()

    def _watch(self, fuse: FuseMount) -> None:
        fuse.wait()
        if self._fuse is fuse:
            self._loop.call_soon_threadsafe(self.lost.set)

    async def _open_remote(self, folder: Path, options: RemoteOptions) -> Path:
        self._backend = await self._open_backend(self._begin.entry, check=self._begin.check)
        threading.Thread(target=self._invalidate_changed, name="invalidate", daemon=True).start()
        self._remote = RemoteFolder(
            folder,
            self._backend,
            loop=self._loop,
            record=self._record_call,
            settings=RemoteSettings(
                asynchronous=bool(self._begin.entry.get("async")),
                cache_bytes=options.cache_bytes,
                parallel_uploads=options.uploads,
            ),
            changed=self._changed_remotely,
        )
        await self._remote.start()
        return self._remote.tree_path

    async def _open_backend(self, entry: dict[str, Any], *, check: bool) -> FileSystem:
        plugin = plugins.file_system_class(self._begin.backend)
        backend: FileSystem = plugins.build(plugin, entry)
        await backend.open()
        self._case_sensitive = backend.case_sensitive
        if check:
            try:
                await ask_something(backend)
            except BaseException:
                await backend.close()
                raise
        return backend

    def _rules(self, rules: Sequence[AclRule]) -> Rules:
        return Rules(rules, self._begin.mount, case_sensitive=self._case_sensitive)

    def _record(self, access: FsAccess) -> None:
        duration_ms = round(access.duration_seconds * 1000)
        told = Access(access.access == "allowed", access.operation, _text(access.path), duration_ms, access.error)
        self._outbox.record(told)

    def _record_call(self, call: SyncCall) -> None:
        if call.duration_seconds is None:
            self._outbox.tell(SyncBegan(call.number, call.operation, _text(call.path)))
        else:
            self._outbox.tell(SyncEnded(call.number, round(call.duration_seconds * 1000), call.error))

    def _changed_remotely(self, path: str) -> None:
        self._changed.put(path)

    def _invalidate_changed(self) -> None:
        """In a thread of its own: the kernel may ask about a name while it is told to forget it."""
        while (path := self._changed.get()) is not None:
            fuse = self._fuse
            if fuse is not None:
                fuse.invalidate(path)

    async def change(self, question: Change) -> None:
        """In force when this returns."""
        if question.entry is not None and self._remote is not None:
            before, self._backend = self._backend, await self._open_backend(question.entry, check=True)
            self._remote.use(self._backend)
            if before is not None:
                await before.close()
        if self._fuse is not None:
            self._fuse.set_record(self._record if question.recording else None)
            await asyncio.to_thread(self._fuse.set_rules, self._rules(question.rules))

    async def upload(self, seconds: float) -> bool:
        """True when nothing is pending."""
        return self._remote is None or (await self._remote.drain(seconds)).count == 0

    def pending(self) -> Backlog:
        if self._remote is None:
            return Backlog()
        pending = self._remote.pending()
        return Backlog(pending.count, pending.bytes)

    async def unmount(self) -> None:
        """What the agent has open is cut off. Idempotent."""
        fuse, self._fuse = self._fuse, None
        if fuse is not None:
            await asyncio.to_thread(fuse.close)

    async def close(self, *, remove: bool) -> None:
        """`remove`: also the copy of remote files, if nothing of it is pending."""
        await self.unmount()
        self._changed.put(None)
        if self._remote is None:
            return
        done = self._remote.pending().count == 0
        await self._remote.stop()
        if self._backend is not None:
            await self._backend.close()
        if remove and done:
            await asyncio.to_thread(shutil.rmtree, self._begin.folder, ignore_errors=True)


def _owner_of(folder: Path) -> FolderOwner:
    found = folder.stat()
    return FolderOwner(found.st_uid, found.st_gid)


def _text(path: str) -> str:
    return path if path.isascii() else shown(os.fsencode(path))
