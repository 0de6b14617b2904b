"""Runs scripts in workers: a few processes, started when needed, ended when idle or when they misbehave."""

from __future__ import annotations

import asyncio
import logging
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
        self._idle_seconds = idle_seconds
        self._room = asyncio.Semaphore(max_workers)
        self._idle: dict[WorkerProcess, asyncio.TimerHandle] = {}
        self._workers: set[WorkerProcess] = set()
        self._closed = False

    @property
    def pids(self) -> frozenset[int]:
        """Of the workers that live."""
        return frozenset(worker.pid for worker in self._workers)

    def share(self) -> ScriptShare:
        """What one sandbox gets of it."""
        return ScriptShare(self)

    async def run(self, call: Call) -> Answer:
        """Raises `ScriptError`."""
        try:
            async with asyncio.timeout(QUEUE_SECONDS):
                await self._room.acquire()
        except TimeoutError as error:
            raise ScriptError("no worker was free in time") from error
        try:
            worker = self._take()
        except BaseException:
            self._room.release()
            raise
        try:
            async with asyncio.timeout(RUN_SECONDS):
                content = await worker.exchange(frame(call))
            answer = decode_answer(content)
        except TimeoutError as error:
            worker.kill()
            raise ScriptError(f"it gave no answer within {RUN_SECONDS:g} s") from error
        except (WorkerLostError, msgspec.MsgspecError) as error:
            worker.kill()
            raise ScriptError("its process died") from error
        except BaseException:
            worker.kill()
            raise
        worker.settle(self._settled, RUN_SECONDS)
        return answer

    async def close(self) -> None:
        """Ends all workers, those that run something as well, and waits for that."""
        self._closed = True
        workers = tuple(self._workers)
        for worker in workers:
            worker.kill()
        await asyncio.gather(*(worker.ended.wait() for worker in workers))

    def _take(self) -> WorkerProcess:
        """An idle worker, the one that was used last, or a new one. The caller holds a place in `_room`."""
        if self._closed:
            raise ScriptError("the server stops")
        while self._idle:
            worker, timer = self._idle.popitem()
            timer.cancel()
            if worker.clean:
                worker.on_end = self._lost
                return worker
            worker.kill()
        try:
            worker = WorkerProcess()
        except OSError as error:
            log.error("no process can be started for an override_script: %s", error.strerror)
            raise ScriptError("its process could not be started") from error
        worker.on_end = self._lost
        self._workers.add(worker)
        return worker

    def _settled(self, worker: WorkerProcess) -> None:
        """All of the run is over, and the worker can take another call."""
        worker.on_end = self._idle_lost
        loop = asyncio.get_running_loop()
        self._idle[worker] = loop.call_later(self._idle_seconds, self._end_idle, worker)
        self._room.release()

    def _end_idle(self, worker: WorkerProcess) -> None:
        del self._idle[worker]
        worker.kill()

    def _lost(self, worker: WorkerProcess) -> None:
        self._workers.discard(worker)
        self._room.release()

    def _idle_lost(self, worker: WorkerProcess) -> None:
        self._workers.discard(worker)
        timer = self._idle.pop(worker, None)
        if timer is not None:
            timer.cancel()


class ScriptShare:
    """One sandbox's use of the pool."""

    def __init__(self, pool: ScriptPool) -> None:
        self._pool = pool
        self._room = asyncio.Semaphore(MAX_OF_ONE_SANDBOX)

    async def run(self, call: Call) -> Answer:
        """Raises `ScriptError`."""
        try:
            async with asyncio.timeout(QUEUE_SECONDS):
                await self._room.acquire()
        except TimeoutError as error:
            raise ScriptError("too many scripts of this sandbox are waiting") from error
        try:
            return await self._pool.run(call)
        finally:
            self._room.release()
