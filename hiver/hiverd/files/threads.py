"""Worker threads for blocking file work, shared fairly between sandboxes.

A file system under a sandbox can hang (a dead FUSE or network mount). So no sandbox gets more than a few threads, a
cancelled caller leaves at once while its thread finishes on its own, and whatever that thread still opens is closed.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Generic, Protocol, TypeVar

from hiverd.contracts.errors import UnavailableError

T = TypeVar("T")

_WAIT_SECONDS: Final = 30.0


class Closable(Protocol):
    def close(self) -> None: ...


ClosableT = TypeVar("ClosableT", bound=Closable)


class Guarded(Generic[ClosableT]):
    """Something that threads use and that anyone may close at any time.

    Closing while a thread is inside a call happens when that call returns, so that (for instance) the number of a file
    descriptor is never reused under a thread that still reads from it.
    """

    def __init__(self, resource: ClosableT) -> None:
        self._resource = resource
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False

    def use(self, function: Callable[[ClosableT], T]) -> T:
        """Calls `function` with the resource. Raises `UnavailableError` once closed."""
        with self._lock:
            if self._closed:
                raise UnavailableError("the file was closed")
            self._users += 1
        try:
            return function(self._resource)
        finally:
            with self._lock:
                self._users -= 1
                last = self._finished()
            if last:
                self._resource.close()

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            last = self._finished()
        if last:
            self._resource.close()

    def _finished(self) -> bool:
        return self._closed and not self._users


class _Share:
    """What one sandbox may use of the threads; forgotten when nobody uses it."""

    def __init__(self, threads: int) -> None:
        self.slots = asyncio.Semaphore(threads)
        self.users = 0


class FileThreads:
    """A bounded pool. Belongs to one event loop."""

    def __init__(self, *, threads: int = 64, threads_per_sandbox: int = 4) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="files")
        self._threads_per_sandbox = threads_per_sandbox
        self._shares: dict[str, _Share] = {}

    async def run(self, sandbox_id: str, function: Callable[[], T]) -> T:
        """Runs `function` in a thread. Raises `UnavailableError` when the sandbox's threads stay busy for 30 s."""
        return await self._run(sandbox_id, function, None)

    async def open(self, sandbox_id: str, function: Callable[[], ClosableT]) -> ClosableT:
        """Like `run` for what must be closed: if the caller is cancelled meanwhile, the result is closed."""
        return await self._run(sandbox_id, function, lambda result: result.close())

    async def _run(self, sandbox_id: str, function: Callable[[], T], dispose: Callable[[T], None] | None) -> T:
        share = self._shares.setdefault(sandbox_id, _Share(self._threads_per_sandbox))
        share.users += 1
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                await share.slots.acquire()
        except BaseException as error:
            self._leave(sandbox_id, share)
            if isinstance(error, TimeoutError):
                raise UnavailableError("file operations of this sandbox do not come back") from None
            raise

        try:
            future = asyncio.get_running_loop().run_in_executor(self._executor, function)
        except BaseException:
            share.slots.release()
            self._leave(sandbox_id, share)
            raise
        # The slot belongs to the thread, not to whoever waits for it.
        future.add_done_callback(lambda _: share.slots.release())
        future.add_done_callback(lambda _: self._leave(sandbox_id, share))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(lambda done: self._discard(done, dispose))
            raise

    def _discard(self, future: asyncio.Future[T], dispose: Callable[[T], None] | None) -> None:
        if not future.cancelled() and future.exception() is None and dispose is not None:
            result = future.result()
            self._submit(lambda: dispose(result))

    def dispose(self, resource: Closable) -> None:
        """Closes something in a thread, as closing may block too, without waiting for it."""
        self._submit(resource.close)

    def _submit(self, function: Callable[[], None]) -> None:
        try:
            self._executor.submit(function)
        except RuntimeError:  # the pool is closed
            function()

    def _leave(self, sandbox_id: str, share: _Share) -> None:
        share.users -= 1
        if not share.users and self._shares.get(sandbox_id) is share:
            del self._shares[sandbox_id]

    def close(self) -> None:
        """Takes no more work. Threads that hang in a dead file system are not waited for."""
        self._executor.shutdown(wait=False, cancel_futures=True)
