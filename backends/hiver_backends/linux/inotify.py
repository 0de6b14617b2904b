"""One inotify instance for all sandboxes: wakes whoever tails a log or waits for an exit file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from pathlib import Path
from typing import Final

from . import syscalls

_EVENT: Final = struct.Struct("iIII")
_MASK: Final = (
    syscalls.IN_MODIFY | syscalls.IN_CLOSE_WRITE | syscalls.IN_MOVED_TO | syscalls.IN_CREATE | syscalls.IN_ONLYDIR
)
_OVERFLOW: Final = 0x4000


class FolderWatch:
    """Changes in one folder. Look first at `changed`, then at the files, then wait: no change is missed."""

    def __init__(self, owner: Inotify, number: int) -> None:
        self._owner = owner
        self.number: Final = number
        self.changed: Final = asyncio.Event()

    async def wait(self, timeout_seconds: float | None = None) -> bool:
        """Until something changed since the last call; False on timeout."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self.changed.wait()
        except TimeoutError:
            return False
        self.changed.clear()
        return True

    def close(self) -> None:
        """Idempotent."""
        self._owner.forget(self)


class Inotify:
    """The instance. Use from the event loop's thread only."""

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._watches: dict[int, set[FolderWatch]] = {}

    def watch(self, folder: Path) -> FolderWatch:
        """Raises `FileNotFoundError` if the folder is gone."""
        if self._descriptor is None:
            self._descriptor = syscalls.inotify_init()
            asyncio.get_running_loop().add_reader(self._descriptor, self._dispatch)
        # Watching the same folder again yields the same number.
        number = syscalls.inotify_add_watch(self._descriptor, str(folder), _MASK)
        watch = FolderWatch(self, number)
        self._watches.setdefault(number, set()).add(watch)
        return watch

    def forget(self, watch: FolderWatch) -> None:
        """Ends one watch."""
        others = self._watches.get(watch.number)
        if others is None or watch not in others:
            return
        others.discard(watch)
        if not others:
            del self._watches[watch.number]
            if self._descriptor is not None:
                with contextlib.suppress(OSError):
                    syscalls.inotify_rm_watch(self._descriptor, watch.number)

    def close(self) -> None:
        """Frees the instance and wakes all waiters."""
        if self._descriptor is not None:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None
        for watches in self._watches.values():
            for watch in watches:
                watch.changed.set()
        self._watches.clear()

    def _dispatch(self) -> None:
        if self._descriptor is None:
            return
        try:
            data = os.read(self._descriptor, 65536)
        except BlockingIOError:
            return
        offset = 0
        while offset < len(data):
            number, mask, _, name_length = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size + name_length
            if mask & _OVERFLOW:
                woken = [watch for watches in self._watches.values() for watch in watches]
            else:
                woken = list(self._watches.get(number, ()))
            for watch in woken:
                watch.changed.set()
