"""The server's side of a mount server's control socket."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec

from hiverd.contracts.errors import BackendError, HiverError, InvalidError, UnavailableError, UnsupportedError
from hiverd.fuse import launch
from hiverd.fuse.frames import (
    Done,
    Failure,
    FailureKind,
    FrameError,
    Question,
    Recorded,
    Told,
    frame,
    read_frame,
    told_of,
)

log = logging.getLogger(__name__)

_ERRORS: Final[dict[FailureKind, type[HiverError]]] = {
    "invalid": InvalidError,
    "unsupported": UnsupportedError,
    "refused": InvalidError,
    "missing": InvalidError,
    "unreachable": UnavailableError,
    "internal": BackendError,
}


class MountServerLostError(UnavailableError):
    """The process has ended, or does not answer."""


class Connection:
    """Questions and answers with one mount server. What it tells unasked goes to `take`, in order; while `take` waits,
    nothing more is read, and the agent's accesses wait in the end."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        take: Callable[[Told], Awaitable[None]],
        on_lost: Callable[[], None],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._take = take
        self._on_lost = on_lost
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Done]] = {}
        self._closing = False
        self._task = asyncio.create_task(self._read(), name="mount-server-connection")

    @classmethod
    async def open(cls, path: Path, take: Callable[[Told], Awaitable[None]], on_lost: Callable[[], None]) -> Connection:
        """`on_lost` is called once if the other side goes away. Raises `OSError`."""
        with launch.reachable(path.parent) as short:
            reader, writer = await asyncio.open_unix_connection(f"{short}/{path.name}")
        return cls(reader, writer, take, on_lost)

    def next_number(self) -> int:
        """For the next question."""
        return next(self._numbers)

    async def ask(self, question: Question, timeout_seconds: float) -> Done:
        """The answer, whatever it is. Raises `MountServerLostError`."""
        if self._task.done():
            raise MountServerLostError("the mount's process has ended")
        future: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        self._waiting[question.number] = future
        try:
            self._writer.write(frame(question))
            async with asyncio.timeout(timeout_seconds):
                return await future
        except (OSError, TimeoutError) as error:
            raise MountServerLostError("the mount's process does not answer") from error
        finally:
            self._waiting.pop(question.number, None)

    def confirm(self, accesses: int) -> None:
        """So many of the accesses that were told here are on record for good."""
        if not self._task.done():
            self._writer.write(frame(Recorded(accesses)))

    async def close(self) -> None:
        """Leaves; the mount goes on. Idempotent."""
        self._closing = True
        self._task.cancel()
        await asyncio.wait({self._task})
        self._writer.close()

    async def _read(self) -> None:
        try:
            while (content := await read_frame(self._reader)) is not None:
                message = told_of(content)
                if isinstance(message, Done):
                    self._answered(message)
                else:
                    await self._take(message)
        except (OSError, FrameError, msgspec.MsgspecError) as error:
            log.warning("the connection to a mount's process broke: %s", error)
        finally:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(MountServerLostError("the mount's process has ended"))
            if not self._closing:
                self._writer.close()
                self._on_lost()

    def _answered(self, done: Done) -> None:
        future = self._waiting.get(done.number)
        if future is not None and not future.done():
            future.set_result(done)


def error_of(failure: Failure, field: str) -> HiverError:
    """As the caller of the API gets it; `field` names the entry, as in `fs[0]`."""
    cls = _ERRORS[failure.kind]
    message = f"{field}: {failure.message}"
    if issubclass(cls, InvalidError):
        return cls(message, field=f"{field}.{failure.field}" if failure.field else field)
    return cls(message)
