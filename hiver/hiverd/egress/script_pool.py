"""Runs scripts in workers: a few processes, started when needed, ended when idle or when they misbehave."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Final

import msgspec

from hiverd.egress.script import ScriptError
from hiverd.egress.script_frames import Answer, Call, decode_answer, frame
from hiverd.egress.script_process import WorkerLostError, WorkerProcess

MAX_WORKERS: Final = 4
MAX_OF_ONE_SANDBOX: Final = 2
"""Runs at a time, so that a sandbox whose scripts are slow does not hold up the others."""
RUN_SECONDS: Final = 5.0
"""From sending a call to its answer. Processor time is limited by the worker; this is for when it gets none."""
QUEUE_SECONDS: Final = 10.0
IDLE_SECONDS: Final = 30.0

log = logging.getLogger(__name__)


class ScriptPool:
    """One for all sandboxes; used from one event loop only, in the thread that started it."""

    def __init__(self, max_workers: int = MAX_WORKERS, idle_seconds: float = IDLE_SECONDS) -> None:
        self._max_workers = max_workers
        self._idle_seconds = idle_seconds
        self._workers: set[WorkerProcess] = set()
        self._idle: dict[WorkerProcess, asyncio.TimerHandle] = {}
        self._settling: set[WorkerProcess] = set()
        """Have answered, and will be idle in a moment."""
        self._queue: deque[asyncio.Future[WorkerProcess]] = deque()
        self._closed = False

    @property
    def pids(self) -> frozenset[int]:
        """Of the workers that live."""
        return frozenset(worker.pid for worker in self._workers)

    @property
    def idle_count(self) -> int:
        """Of workers that wait for a call."""
        return len(self._idle)

    def share(self) -> ScriptShare:
        """What one sandbox gets of it."""
        return ScriptShare(self)

    async def run(self, call: Call) -> Answer:
        """Raises `ScriptError` if there is no answer."""
        worker = await self._acquire()
        try:
            async with asyncio.timeout(RUN_SECONDS):
                answer = decode_answer(await worker.exchange(frame(call)))
        except TimeoutError as error:
            worker.kill()
            raise ScriptError(f"it gave no answer within {RUN_SECONDS:g} s") from error
        except (WorkerLostError, msgspec.MsgspecError) as error:
            worker.kill()
            raise ScriptError("its process died") from error
        except BaseException:
            worker.kill()
            raise
        self._settling.add(worker)
        worker.settle(self._settled, RUN_SECONDS)
        return answer

    async def close(self) -> None:
        """Ends all workers, those that run something as well, and waits for that."""
        self._closed = True
        self._serve_queue()
        workers = tuple(self._workers)
        for worker in workers:
            worker.kill()
        await asyncio.gather(*(worker.ended.wait() for worker in workers))

    async def _acquire(self) -> WorkerProcess:
        turn: asyncio.Future[WorkerProcess] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        self._serve_queue()
        try:
            async with asyncio.timeout(QUEUE_SECONDS):
                return await turn
        except BaseException as error:
            if not turn.cancelled() and turn.exception() is None:
                self._settled(turn.result())  # it came at the moment in which the caller left
            if isinstance(error, TimeoutError):
                raise ScriptError("no worker was free in time") from error
            raise

    def _serve_queue(self) -> None:
        """Whoever waits gets an idle worker; or a new one, if none that has answered is about to be idle."""
        while self._queue:
            turn = self._queue[0]
            if not turn.done():
                try:
                    worker = self._free_worker()
                except ScriptError as error:
                    turn.set_exception(error)
                else:
                    if worker is None:
                        return
                    turn.set_result(worker)
            self._queue.popleft()

    def _free_worker(self) -> WorkerProcess | None:
        """The idle worker that was used last, or a new one; None: not now. Raises `ScriptError`."""
        if self._closed:
            raise ScriptError("the server stops")
        while self._idle:
            worker, timer = self._idle.popitem()
            timer.cancel()
            if worker.clean:
                return worker
            worker.kill()
        if self._settling or len(self._workers) >= self._max_workers:
            return None
        try:
            worker = WorkerProcess(self._lost)
        except OSError as error:
            log.error("no process can be started for an override_script: %s", error.strerror)
            raise ScriptError("its process could not be started") from error
        self._workers.add(worker)
        return worker

    def _settled(self, worker: WorkerProcess) -> None:
        """All of the run is over, and the worker can take another call."""
        self._settling.discard(worker)
        self._idle[worker] = asyncio.get_running_loop().call_later(self._idle_seconds, self._end_idle, worker)
        self._serve_queue()

    def _end_idle(self, worker: WorkerProcess) -> None:
        del self._idle[worker]
        worker.kill()

    def _lost(self, worker: WorkerProcess) -> None:
        self._workers.discard(worker)
        self._settling.discard(worker)
        timer = self._idle.pop(worker, None)
        if timer is not None:
            timer.cancel()
        self._serve_queue()


class ScriptShare:
    """One sandbox's use of the pool."""

    def __init__(self, pool: ScriptPool) -> None:
        self._pool = pool
        self._room = asyncio.Semaphore(MAX_OF_ONE_SANDBOX)

    async def run(self, call: Call) -> Answer:
        """Raises `ScriptError` if there is no answer."""
        try:
            async with asyncio.timeout(QUEUE_SECONDS):
                await self._room.acquire()
        except TimeoutError as error:
            raise ScriptError("too many scripts of this sandbox are waiting") from error
        try:
            return await self._pool.run(call)
        finally:
            self._room.release()
