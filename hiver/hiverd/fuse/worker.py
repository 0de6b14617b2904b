"""The mount server: a process that serves one governed mount, and uploads what is pending when the mount is gone.

Descriptor 0 is the listening control socket. One server at a time is connected; a new one takes over. Without one,
the mount goes on as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
from typing import Final

import msgspec

from hiverd.fuse.frames import (
    Attach,
    Begin,
    Change,
    Done,
    Failure,
    Finish,
    FrameError,
    Pending,
    Question,
    Quit,
    Recorded,
    Said,
    Tell,
    frame,
    heard_of,
    read_frame,
)
from hiverd.fuse.outbox import Outbox
from hiverd.fuse.serving import Serving, failure_of

log = logging.getLogger(__name__)

ALONE_SECONDS: Final = 30.0
"""How long one that only uploads goes on without a server."""
FIRST_SECONDS: Final = 60.0
"""How long it waits to be told what to serve."""
PENDING_SECONDS: Final = 1.0


class Worker:
    """Answers the server's questions about one mount."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox(self._loop)
        self._serving: Serving | None = None
        self._ended = asyncio.Event()
        self._turn = asyncio.Lock()
        self._finishing: asyncio.Task[None] | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until there is nothing to serve any more."""
        server = await asyncio.start_unix_server(self._connected, sock=self._listener)
        watcher = asyncio.create_task(self._watch(), name="watch")
        logging.getLogger().addHandler(_Telling(self._outbox))
        async with server:
            await self._ended.wait()
            await self._outbox.flush()
        watcher.cancel()
        for task in self._connections:
            task.cancel()
        await asyncio.wait({watcher, *self._connections})

    def stop(self) -> None:
        """As `Quit`: the host goes down, or somebody has sent a signal."""
        task = asyncio.create_task(self._quit(), name="stop")
        self._connections.add(task)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 -- asyncio runs this in one
        self._connections.add(task)
        self._outbox.attach(writer)
        try:
            while (content := await read_frame(reader)) is not None:
                question = heard_of(content)
                if isinstance(question, Recorded):
                    self._outbox.confirmed(writer, question.accesses)
                    continue
                done = await self._answer(question)
                if isinstance(question, Tell | Finish | Quit):
                    await self._outbox.flush()
                writer.write(frame(done))
                await writer.drain()
                if isinstance(question, Quit):
                    self._ended.set()
        except (OSError, FrameError, msgspec.MsgspecError) as error:
            log.warning("the connection to the server broke: %s", error)
        finally:
            self._outbox.detach(writer)
            self._connections.discard(task)
            writer.close()

    async def _answer(self, question: Question) -> Done:
        failure: Failure | None = None
        async with self._turn:
            try:
                await self._obey(question)
            except Exception as error:  # noqa: BLE001 -- told to the server, whatever it is
                failure = failure_of(error)
        pending = 0 if self._serving is None else self._serving.pending().files
        return Done(number=question.number, pid=os.getpid(), pending=pending, failure=failure)

    async def _obey(self, question: Question) -> None:
        if isinstance(question, Begin):
            await self._begin(question)
            return
        if self._serving is None:
            raise RuntimeError("nothing is served yet")
        match question:
            case Attach(server_pid=pid):
                self._serving.server.pid = pid
            case Change():
                await self._serving.change(question)
            case Finish():
                await self._serving.unmount()
                self._finish()
            case Quit():
                await self._serving.unmount()
                await self._serving.close(remove=False)

    async def _begin(self, begin: Begin) -> None:
        if self._serving is not None:
            raise RuntimeError("something is served already")
        serving = Serving(begin, self._outbox)
        try:
            await serving.start()
        except BaseException:
            await serving.close(remove=False)
            raise
        self._serving = serving
        self._end_with(serving)
        if begin.mountpoint is None:
            self._finish()

    def _end_with(self, serving: Serving) -> None:
        """If the kernel ends the mount, so does this process: its server makes another."""

        async def follow() -> None:
            await serving.lost.wait()
            log.error("the kernel has ended the mount %s", serving.mount)
            await self._quit()

        self._connections.add(asyncio.create_task(follow(), name="lost"))

    def _finish(self) -> None:
        if self._finishing is None:
            self._finishing = asyncio.create_task(self._upload_all(), name="finish")

    async def _upload_all(self) -> None:
        assert self._serving is not None  # noqa: S101 -- checked by the caller
        while not await self._serving.upload(PENDING_SECONDS):
            pass
        await self._serving.close(remove=True)
        self._ended.set()

    async def _quit(self) -> None:
        if self._serving is not None:
            await self._serving.unmount()
            await self._serving.close(remove=False)
        self._ended.set()

    async def _watch(self) -> None:
        """Tells about what is pending, and ends what has no purpose."""
        told = 0
        alone_since: float | None = self._loop.time()
        while not self._ended.is_set():
            await asyncio.sleep(PENDING_SECONDS)
            alone_since = None if self._outbox.attached else alone_since or self._loop.time()
            if alone_since is not None and self._purposeless(self._loop.time() - alone_since):
                await self._quit()
                return
            if self._serving is not None:
                pending = self._serving.pending()
                if pending.files or told:
                    self._outbox.tell(Pending(pending.files, pending.size_bytes))
                told = pending.files

    def _purposeless(self, alone_seconds: float) -> bool:
        if self._serving is None:
            return alone_seconds > FIRST_SECONDS
        return self._finishing is not None and alone_seconds > ALONE_SECONDS


class _Telling(logging.Handler):
    """Log lines go to the server as well, which is where somebody reads them."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__(logging.WARNING)
        self._outbox = outbox

    def emit(self, record: logging.LogRecord) -> None:
        if self._outbox.attached:
            self._outbox.tell(Said(record.levelno, record.getMessage()))


async def _run(listener: socket.socket) -> None:
    worker = Worker(listener)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.stop)
    await worker.run()


def main() -> None:
    """Serves what the first connection asks for."""
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(message)s", force=True
    )
    logging.getLogger("hiverd").setLevel(logging.INFO)
    # Each file that the agent has open is a descriptor here, and each directory that was looked at for a while.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.suppress(OSError):
        os.nice(1)
    with socket.socket(fileno=os.dup(0)) as listener:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        listener.setblocking(False)
        asyncio.run(_run(listener))
