"""Threads of a store's own: where a disk or a service hangs, nobody but its callers waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Final, ParamSpec, TypeVar

from hiver_snapshots.pieces import blocks

P = ParamSpec("P")
T = TypeVar("T")

_THREADS: Final = 8


class Threads:
    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="snapshots")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: function(*args, **kwargs))

    async def acquire(self, function: Callable[[], T], release: Callable[[T], object]) -> T:
        """As `run`. What it returns is released if the caller was cancelled before it came."""
        future = asyncio.get_running_loop().run_in_executor(self._pool, function)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(lambda done: done.cancelled() or done.exception() or release(done.result()))
            raise

    async def write(
        self,
        content: AsyncIterator[bytes],
        write: Callable[[bytes], None],
        told: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Writes all of it, in order. A block is written while the next one is waited for: whoever makes the content
        need not stand still. `told` is around what writing raises, and not around what `content` does."""
        writing: asyncio.Future[None] | None = None
        try:
            async for block in blocks(content):
                if writing is not None:
                    with told():
                        await writing
                writing = asyncio.ensure_future(self.run(write, block))
            if writing is not None:
                with told():
                    await writing
        finally:
            if writing is not None:
                writing.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def settle(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> None:
        """Cleaning up: done also if the caller is cancelled meanwhile."""
        await asyncio.shield(asyncio.ensure_future(self.run(function, *args, **kwargs)))

    def close(self) -> None:
        self._pool.shutdown(wait=False)
