"""What must not hold up the thread that serves: requests that wait for the disk, and telling the kernel to forget."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final

from hiverd.fuse import abi, syscalls
from hiverd.fuse.caller import Caller
from hiverd.fuse.dispatch import Buffers

_log = logging.getLogger(__name__)

SLOW: Final = frozenset({abi.FSYNC, abi.FSYNCDIR, abi.FALLOCATE, abi.COPY_FILE_RANGE})


def send(fd: int, answer: Buffers) -> None:
    """Gives an answer to the kernel, which may no longer want it."""
    try:
        os.writev(fd, answer)
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ENODEV}:
            raise


class Aside:
    """One thread with a queue. The kernel keeps the queue short: whoever asks waits for the answer."""

    def __init__(self, answer: Callable[[Caller, memoryview], Buffers | None], callers: list[Caller]) -> None:
        self._answer = answer
        self._caller = Caller()
        callers.append(self._caller)
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="fuse-aside", daemon=True)
        self._fd = -1

    def start(self, fd: int) -> None:
        self._fd = fd
        self._thread.start()

    def serve(self, request: bytes) -> None:
        self._queue.put(lambda: self._serve(request))

    def do(self, work: Callable[[], None]) -> None:
        self._queue.put(work)

    def close(self) -> None:
        """After what is queued."""
        self._queue.put(None)
        if self._fd >= 0:
            self._thread.join()

    def _serve(self, request: bytes) -> None:
        answer = self._answer(self._caller, memoryview(request))
        if answer is not None:
            send(self._fd, answer)

    def _work(self) -> None:
        syscalls.own_thread_identity()
        while (work := self._queue.get()) is not None:
            try:
                work()
            except OSError:
                _log.exception("work beside the serving thread failed")
