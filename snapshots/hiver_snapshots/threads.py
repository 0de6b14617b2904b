"""Threads of a store's own: where a disk or a service hangs, nobody but its callers waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, ParamSpec, TypeVar

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

    async def settle(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> None:
        """Cleaning up: done also if the caller is cancelled meanwhile."""
        await asyncio.shield(asyncio.ensure_future(self.run(function, *args, **kwargs)))

    def close(self) -> None:
        self._pool.shutdown(wait=False)
