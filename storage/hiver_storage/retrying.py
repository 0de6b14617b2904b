"""Attempts that are repeated for some seconds, and content that is cut into what one request takes."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeVar

T = TypeVar("T")

PIECE_BYTES: Final = 1 << 20
_FIRST_DELAY_SECONDS: Final = 0.2
_LONGEST_DELAY_SECONDS: Final = 4.0


class TransientError(Exception):
    """An attempt failed, and another one may not. Never leaves a plug-in: `error` does."""

    def __init__(self, code: int, message: str, *, retry_after_seconds: float | None = None, done: bool = True) -> None:
        super().__init__(message)
        self.error = OSError(code, message)
        self.retry_after_seconds = retry_after_seconds
        """What the service asked for."""
        self.may_be_done = done
        """False: the service certainly did nothing."""


class Patience:
    """How long one request is repeated after its first failure. The core repeats uploads for longer than that."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds

    async def repeat(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """The first answer of `attempt`; the last attempt's `OSError` when time is up."""
        deadline_monotonic = float("inf")
        number = 0
        while True:
            try:
                return await attempt()
            except TransientError as failure:
                deadline_monotonic = min(deadline_monotonic, time.monotonic() + self.seconds)
                delay_seconds = pause_seconds(number, failure.retry_after_seconds)
                if time.monotonic() + delay_seconds > deadline_monotonic:
                    raise failure.error from None
            number += 1
            await asyncio.sleep(delay_seconds)


def pause_seconds(number: int, asked_seconds: float | None = None) -> float:
    """How long to wait after the failure of that number; at least what the service asked for."""
    grown: float = min(_FIRST_DELAY_SECONDS * 2**number, _LONGEST_DELAY_SECONDS)
    return max(grown * random.uniform(0.5, 1), asked_seconds or 0)  # noqa: S311 -- not a secret


async def exactly(content: AsyncIterator[bytes], size: int) -> AsyncIterator[bytes]:
    """`content` without empty pieces. `OSError` EINVAL if it is not `size` bytes, before the last piece is given, so
    that a request with less than the whole is never complete."""
    held = b""
    total = 0
    async for piece in content:
        total += len(piece)
        if total > size:
            break
        if held and piece:
            yield held
        held = piece or held
    if total != size:
        raise OSError(errno.EINVAL, "the content does not have the size that was announced")
    if held:
        yield held


async def in_blocks(content: AsyncIterator[bytes], size: int, block_bytes: int) -> AsyncIterator[bytes]:
    """`content` in blocks of one size; the last is what is left, and is given only when `content` has ended well."""
    kept = bytearray()
    async for piece in exactly(content, size):
        kept += piece
        while len(kept) > block_bytes:
            yield bytes(kept[:block_bytes])
            del kept[:block_bytes]
    if kept:
        yield bytes(kept)


async def collected(content: AsyncIterator[bytes], size: int) -> bytes:
    """All of it, for what is small."""
    return b"".join([piece async for piece in exactly(content, size)])


class Locks:
    """One lock per path, as long as somebody wants it."""

    def __init__(self) -> None:
        self._held: dict[object, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def __call__(self, *keys: object) -> AsyncIterator[None]:
        """Holds all of them; taken in one order, so that two moves never wait for each other."""
        ordered = sorted(set(keys), key=repr)
        for index, key in enumerate(ordered):
            lock, users = self._held.get(key, (asyncio.Lock(), 0))
            self._held[key] = lock, users + 1
            try:
                await lock.acquire()
            except BaseException:
                self._leave(key)
                self._release(ordered[:index])
                raise
        try:
            yield
        finally:
            self._release(ordered)

    def _release(self, keys: list[object]) -> None:
        for key in keys:
            self._held[key][0].release()
            self._leave(key)

    def _leave(self, key: object) -> None:
        lock, users = self._held.pop(key)
        if users > 1:
            self._held[key] = lock, users - 1


def error(code: int, path: str) -> OSError:
    """The `OSError` of that number, of the right class, with its usual text."""
    return OSError(code, os.strerror(code), path)
