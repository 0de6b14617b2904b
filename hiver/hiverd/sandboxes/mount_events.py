"""What mount servers tell, as events of the sandbox (PROTOCOL 6.3, 7)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Protocol

from hiverd.fuse.frames import Access, Accessed, Lost, Pending, Said, SyncBegan, SyncEnded, Told
from hiverd.sandboxes.sandbox import Sandbox
from hiverd.sandboxes.tasks import TaskGroup
from hiverd.state.journal import SandboxEvents
from hiverd.wire.events import FsRequestEvent, FsResponseEvent, SystemFsSyncRequestEvent, SystemFsSyncResponseEvent

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Hears one mount server."""

    pending: int
    """Files that are not uploaded yet, as last told."""

    def connected(self, confirm: Callable[[int], None]) -> None: ...

    async def take(self, message: Told) -> None: ...


class UploadListener:
    """Of a mount whose sandbox is gone."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.pending = 0

    def connected(self, confirm: Callable[[int], None]) -> None:
        """It tells of no accesses."""

    async def take(self, message: Told) -> None:
        match message:
            case Pending(files=files):
                self.pending = files
            case Said(level=level, text=text):
                log.log(level, "%s: %s", self._name, text)


class MountRecorder:
    """Of one governed mount."""

    def __init__(self, sandbox: Sandbox, target: str, backend: str, tasks: TaskGroup) -> None:
        self._key = sandbox.key
        self._events: SandboxEvents = sandbox.events
        self._target = target
        self._backend = backend
        self._tasks = tasks
        self._calls: dict[int, int] = {}
        """Number of a backend call -> id of its request event."""
        self._taken = 0
        self._confirming: asyncio.Task[None] | None = None
        self._confirm: Callable[[int], None] | None = None
        self.pending = 0

    def connected(self, confirm: Callable[[int], None]) -> None:
        """`confirm` is told how many of the accesses taken since now are on record for good."""
        self._confirm = confirm
        self._taken = 0

    async def take(self, message: Told) -> None:
        """Waits while the journal has more to do than it should: then the mount server waits too, and the agent."""
        match message:
            case Accessed(accesses=accesses):
                await self._events.room()
                self._record(accesses)
                self._taken += len(accesses)
                self._confirm_soon()
            case SyncBegan():
                event = SystemFsSyncRequestEvent(
                    backend=self._backend, operation=message.operation, path=self._path(message.path)
                )
                self._calls[message.call] = self._events.emit(event)
            case SyncEnded():
                self._ended(message)
            case Pending(files=files):
                self.pending = files
            case Lost():
                text = "sandbox %s: %d accesses to %s and %d of its other messages are not on record: no server ran"
                log.warning(text, self._key, message.accesses, self._target, message.others)
            case Said(level=level, text=text):
                log.log(level, "sandbox %s, mount %s: %s", self._key, self._target, text)

    def _record(self, accesses: Sequence[Access]) -> None:
        for plain, group in groupby(accesses, _is_plain):
            if plain:
                items = [(access.operation, self._target, self._path(access.path)) for access in group]
                self._events.emit_accesses(self._backend, items)
            else:
                for access in group:
                    self._record_one(access)

    def _record_one(self, access: Access) -> None:
        request = FsRequestEvent(
            access="allowed" if access.allowed else "denied",
            mount=self._target,
            path=self._path(access.path),
            operation=access.operation,
        )
        request_id = self._events.emit(request)
        response = FsResponseEvent(
            backend=self._backend, request_id=request_id, duration_ms=access.duration_ms, error=access.error
        )
        self._events.emit(response)

    def _confirm_soon(self) -> None:
        if self._confirm is not None and (self._confirming is None or self._confirming.done()):
            self._confirming = self._tasks.start(self._confirm_all(), name=f"confirm-{self._key}")

    async def _confirm_all(self) -> None:
        confirmed = -1
        while (confirm := self._confirm) is not None and confirmed != (taken := self._taken):
            await self._events.stored()
            if self._confirm is confirm:
                confirm(taken)
            confirmed = taken

    def _ended(self, message: SyncEnded) -> None:
        request_id = self._calls.pop(message.call, None)
        if request_id is not None:
            self._events.emit(
                SystemFsSyncResponseEvent(request_id=request_id, duration_ms=message.duration_ms, error=message.error)
            )

    def _path(self, path: str) -> str:
        return self._target if path == "/" else self._target + path


def _is_plain(access: Access) -> bool:
    return access.allowed and access.error is None and access.duration_ms == 0
