"""The server's side of a snapshot worker: started ahead, given one order, and gone afterwards whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Final, Self

from hiverd.contracts.errors import BackendError, HiverError, UnavailableError
from hiverd.snapshots.frames import (
    SUBCOMMAND,
    Answer,
    Ask,
    Captured,
    CaptureOrder,
    Failed,
    Going,
    Order,
    Restored,
    RestoreOrder,
    answer_decoder,
    encode,
)

PAUSE_LIMIT_SECONDS: Final = 5.0
"""A workload that is paused goes on after this time, whatever becomes of the capture."""
_BOOT: Final = "import sys; sys.path[:] = sys.argv[2:]; from hiverd.snapshots.worker import main; main()"
_FROZEN_VARIABLES: Final = ("_PYI_", "_MEI", "LD_LIBRARY_PATH")
_READ_BYTES: Final = 1 << 18

Pause = Callable[[bool], Awaitable[frozenset[int]]]
"""Pauses the workload (True), and gives its processes, or lets it go on."""


class WorkerFailedError(HiverError):
    """What the worker was told to do did not come about."""

    def __init__(self, failure: Failed) -> None:
        super().__init__(failure.reason)
        self.failure = failure


class Worker:
    """`async with Worker() as worker`. Must be made on the thread that lives as long as the server: the worker dies
    with the thread that started it."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                _command(),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=_environment(),
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            self._channel.close()
            raise UnavailableError(f"a snapshot worker cannot be started: {error.strerror}") from error
        finally:
            theirs.close()
        self._channel.setblocking(False)
        self._data = b""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Kills it if it still works. Idempotent."""
        self._channel.close()
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await asyncio.shield(asyncio.to_thread(self._process.wait))

    async def capture(self, order: CaptureOrder, spool: int, pause: Pause | None) -> tuple[Captured, float]:
        """Also gives the seconds for which the workload was paused, in its longest pause. `spool`: where the archive's
        parts go. `pause` None: nothing runs. Raises `HiverError`; the workload is not paused then."""
        await self._send(order, [spool])
        longest_seconds = 0.0
        while True:
            answer = await self._receive()
            if isinstance(answer, Ask) and answer.paused and pause is not None:
                started = time.monotonic()
                await self._paused(pause)
                longest_seconds = max(longest_seconds, time.monotonic() - started)
                await self._send(Going())
            elif isinstance(answer, Captured):
                return answer, longest_seconds
            else:
                raise _failure(answer)

    async def _paused(self, pause: Pause) -> None:
        try:
            processes = await pause(True)
            async with asyncio.timeout(PAUSE_LIMIT_SECONDS):
                await self._send(Going(list(processes)))
                answer = await self._receive()
        except TimeoutError:
            raise UnavailableError("too much changed in the sandbox to capture it within a short pause") from None
        finally:
            await asyncio.shield(asyncio.ensure_future(pause(False)))
        if not isinstance(answer, Ask) or answer.paused:
            raise _failure(answer)

    async def restore(self, order: RestoreOrder, archive: int, process: int, root: int) -> Restored:
        """Raises `WorkerFailedError`, whose `failure` says whether part of the archive has been restored."""
        await self._send(order, [archive, process, root])
        answer = await self._receive()
        if isinstance(answer, Restored):
            return answer
        raise _failure(answer)

    async def _send(self, order: Order, descriptors: Sequence[int] = ()) -> None:
        data = encode(order)
        try:
            if descriptors:
                # The first bytes carry them; the buffer is empty, so that this does not block.
                data = data[socket.send_fds(self._channel, [data], list(descriptors)) :]
            await asyncio.get_running_loop().sock_sendall(self._channel, data)
        except OSError as error:
            raise _lost() from error

    async def _receive(self) -> Answer:
        while b"\n" not in self._data:
            try:
                piece = await asyncio.get_running_loop().sock_recv(self._channel, _READ_BYTES)
            except OSError as error:
                raise _lost() from error
            if not piece:
                raise _lost()
            self._data += piece
        line, _, self._data = self._data.partition(b"\n")
        answer: Answer = answer_decoder.decode(line)
        return answer


def _lost() -> WorkerFailedError:
    return WorkerFailedError(Failed("the snapshot worker has ended unexpectedly", touched=True))


def _failure(answer: Answer) -> HiverError:
    if isinstance(answer, Failed):
        return WorkerFailedError(answer)
    return BackendError("the snapshot worker does not keep to the protocol")


def _command() -> list[str]:
    if getattr(sys, "frozen", False):
        return [sys.executable, SUBCOMMAND]
    return [sys.executable, "-I", "-S", "-c", _BOOT, SUBCOMMAND, *(os.path.abspath(entry) for entry in sys.path)]


def _environment() -> dict[str, str]:
    if not getattr(sys, "frozen", False):
        return {}
    return {name: value for name, value in os.environ.items() if name.startswith(_FROZEN_VARIABLES)}
