"""The file API without its HTTP shell: reading, writing, removing, listing inside one sandbox (PROTOCOL 3.10, 6.3)."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import islice
from typing import Final, Protocol, TypeVar

from msgspec import Struct

from hiverd.contracts.errors import HiverError, InvalidError
from hiverd.contracts.isolation import Workload
from hiverd.files import linux, rooted, staged
from hiverd.files.direct import Incoming, Outgoing, Pipe, Progress
from hiverd.files.failures import failure
from hiverd.files.paths import clean, mount_of, names_below, shown
from hiverd.files.threads import FileThreads, Guarded
from hiverd.wire.events import EventSink, FileOperation, FsRequestEvent, FsResponseEvent

T = TypeVar("T")

PIECE_BYTES: Final = 1 << 20
"""How much one visit to a thread reads or writes."""
_PENDING_CHUNKS: Final = 1000
"""How many chunks are gathered for one write: tiny ones would take more memory than they carry."""
BATCH_ENTRIES: Final = 1000
"""How many directory entries are held at a time."""


class Sandbox(Protocol):
    """What the file API needs of a sandbox."""

    @property
    def workload(self) -> Workload: ...

    @property
    def events(self) -> EventSink: ...

    @property
    def mounts(self) -> Sequence[tuple[str, str]]:
        """(mount path, backend) of every configured mount."""

    def touch(self) -> None:
        """Resets the inactivity timer."""


class DirectoryEntry(Struct, frozen=True):
    """One entry as clients see it."""

    name: str
    path: str
    is_dir: bool
    size: int
    """Bytes; 0 for directories."""


class Written(Struct, frozen=True):
    """The answer to an upload."""

    path: str
    bytes: int


class _Report:
    """The `fs.response` half of a call; silent for paths outside every mount."""

    def __init__(self, sandbox: Sandbox, path: bytes, operation: FileOperation) -> None:
        self._events = sandbox.events
        self._started = time.monotonic()
        self._request_id: int | None = None
        found = mount_of(path, tuple(sandbox.mounts))
        if found is not None:
            mount, self._backend = found
            event = FsRequestEvent(access="allowed", mount=mount, path=shown(path), operation=operation)
            self._request_id = self._events.emit(event)

    def finish(self, error: str | None = None) -> None:
        if self._request_id is None:
            return
        duration_ms = int((time.monotonic() - self._started) * 1000)
        request_id, self._request_id = self._request_id, None
        self._events.emit(
            FsResponseEvent(backend=self._backend, request_id=request_id, duration_ms=duration_ms, error=error)
        )


class _OpenFile:
    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size

    def close(self) -> None:
        os.close(self.fd)


class _OpenDirectory:
    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._entries = rooted.entries(fd)

    def next_batch(self) -> list[rooted.Entry]:
        """Up to `BATCH_ENTRIES` entries; empty at the end. Blocks."""
        return list(islice(self._entries, BATCH_ENTRIES))

    def close(self) -> None:
        self._entries.close()
        os.close(self._fd)


class Download:
    """An open file. Close it; `pieces` closes it too when it is run to its end or closed."""

    def __init__(
        self,
        threads: FileThreads,
        sandbox: Sandbox,
        *,
        file: Guarded[_OpenFile],
        path: bytes,
        span: range,
        report: _Report,
    ) -> None:
        self._threads = threads
        self._sandbox = sandbox
        self._sandbox_id = sandbox.workload.sandbox_id
        self._file = file
        self._report = report
        self._span = span
        self.path = path
        self.size = len(span)
        """Bytes that `pieces` gives, fixed when the file was opened."""

    async def pieces(self) -> AsyncGenerator[bytes]:
        """Exactly `size` bytes in pieces of 1 MiB, or EOFError when the file was cut short meanwhile.

        A file that grows is given as long as it was; what another process writes meanwhile may show.
        """
        position, end = self._span.start, self._span.stop
        while position < end:
            wanted = min(PIECE_BYTES, end - position)
            data = await self._read(wanted, position)
            if not data:
                self.close("the file was cut short while it was read")
                raise EOFError(shown(self.path))
            position += len(data)
            self._sandbox.touch()
            yield data
        self.close()

    async def send(self, outgoing: Outgoing) -> None:
        """As `pieces`, straight into a socket. Raises `UnavailableError` too, when the peer has left."""
        while outgoing.sent < self.size:
            position, left = self._span.start + outgoing.sent, self.size - outgoing.sent
            progress = await self._send_some(outgoing, position, left)
            if progress == "ended":
                self.close("the file was cut short while it was read")
                raise EOFError(shown(self.path))
            self._sandbox.touch()
            if progress == "blocked":
                await outgoing.writable()
        self.close()

    async def _send_some(self, outgoing: Outgoing, position: int, left: int) -> Progress:
        async def run(function: Callable[[], Progress]) -> Progress:
            return await self._threads.run(self._sandbox_id, function)

        def give(socket_fd: int) -> Progress:
            return self._file.use(lambda file: outgoing.give(socket_fd, file.fd, position, left))

        with self._closing_on_error():
            return await outgoing.visit(run, give)

    async def _read(self, size: int, position: int) -> bytes:
        with self._closing_on_error():
            return await self._threads.run(
                self._sandbox_id, lambda: self._file.use(lambda file: os.pread(file.fd, size, position))
            )

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = failure(error, self.path, reading=True)
            self.close(problem.message)
            raise problem from error
        except HiverError as error:
            self.close(error.message)
            raise

    def close(self, error: str | None = None) -> None:
        """Idempotent. `error` goes into the event."""
        self._file.close()
        self._report.finish(error)


class FileAccess:
    """All file operations of the server. One per server; owns its threads."""

    def __init__(self, threads: FileThreads | None = None) -> None:
        self._threads = threads or FileThreads()
        linux.keep_freed_memory()

    def close(self) -> None:
        self._threads.close()

    async def read(self, sandbox: Sandbox, path: bytes, offset: int = 0) -> Download:
        """Opens a file from `offset` bytes on.

        Raises `NotFoundError` (missing, or not a regular file) and `InvalidError` (a bad path or offset).
        """
        path = clean(path)
        if offset < 0:
            raise InvalidError("offset must not be negative", field="offset")
        report = _Report(sandbox, path, "read")

        def opened() -> _OpenFile:
            return _OpenFile(*_in_root(sandbox.workload, lambda root: rooted.open_regular(root, path)))

        async with _reported(report, path, reading=True):
            found = await self._threads.open(sandbox.workload.sandbox_id, opened)
            if offset > found.size:
                found.close()
                raise InvalidError(f"offset {offset} is beyond the file's {found.size} bytes", field="offset")
        span = range(offset, found.size)
        return Download(self._threads, sandbox, file=Guarded(found), path=path, span=span, report=report)

    async def write(self, sandbox: Sandbox, path: bytes, content: AsyncIterator[bytes] | Incoming) -> Written:
        """Receives a file whole and puts it in place in one step; on any error and on cancellation nothing is left.

        Raises `InvalidError` for `/`, directories and special files, `ForbiddenError`, `NoSpaceError`.
        """
        path = clean(path)
        if path == b"/":
            raise InvalidError("path is empty", field="path")
        workload = sandbox.workload
        report = _Report(sandbox, path, "write")
        async with _reported(report, path):

            def begin() -> staged.StagedFile:
                return _in_root(workload, lambda root: staged.stage(root, path, workload.root_ids))

            file = await self._threads.open(workload.sandbox_id, begin)
            await _Upload(self._threads, sandbox, file).receive(content)
        report.finish()
        return Written(path=shown(path), bytes=file.size)

    async def delete(self, sandbox: Sandbox, path: bytes) -> None:
        """Removes a file, a link itself, or an empty directory. Raises `NotFoundError`, `InvalidError`."""
        path = clean(path)
        if path == b"/":
            raise InvalidError("path is empty", field="path")
        report = _Report(sandbox, path, "delete")
        async with _reported(report, path):
            await self._threads.run(
                sandbox.workload.sandbox_id,
                lambda: _in_root(sandbox.workload, lambda root: rooted.remove(root, path)),
            )
        report.finish()

    async def list_directory(self, sandbox: Sandbox, path: bytes) -> AsyncGenerator[list[DirectoryEntry]]:
        """The entries in batches, configured mounts included. A directory of one batch is sorted by name.

        Raises `NotFoundError`, `InvalidError` before the first batch.
        """
        path = clean(path)
        sandbox_id = sandbox.workload.sandbox_id
        report = _Report(sandbox, path, "read")

        def opened() -> _OpenDirectory:
            return _in_root(sandbox.workload, lambda root: _OpenDirectory(rooted.open_directory(root, path)))

        def next_batch() -> list[rooted.Entry]:
            return listing.use(_OpenDirectory.next_batch)

        async with _reported(report, path):
            listing = Guarded(await self._threads.open(sandbox_id, opened))
        missing = dict.fromkeys(names_below(path, tuple(sandbox.mounts)))
        prefix = path.rstrip(b"/") + b"/"
        try:
            async with _reported(report, path):
                batch = await self._threads.run(sandbox_id, next_batch)
                while True:
                    following = await self._threads.run(sandbox_id, next_batch) if batch else []
                    for entry in batch:
                        missing.pop(entry.name, None)
                    if not following:
                        batch = sorted([*batch, *(rooted.Entry(name, True, 0) for name in missing)])
                    yield [_shown_entry(prefix, entry) for entry in batch]
                    if not following:
                        break
                    batch = following
        finally:
            listing.close()
        report.finish()


class _Upload:
    """Feeds a staged file in big pieces: one is written in a thread while the next one is received."""

    def __init__(self, threads: FileThreads, sandbox: Sandbox, file: staged.StagedFile) -> None:
        self._threads = threads
        self._sandbox = sandbox
        self._sandbox_id = sandbox.workload.sandbox_id
        self._file = Guarded(file)
        self._writing: asyncio.Task[None] | None = None

    async def receive(self, content: AsyncIterator[bytes] | Incoming) -> None:
        try:
            if isinstance(content, Incoming):
                await self._take_all(content)
            else:
                await self._write_all(content)
            # Closed before the answer goes out: a script still open for writing cannot be executed.
            await self._run(staged.StagedFile.finish)
        finally:
            if self._writing is not None:
                self._writing.add_done_callback(_retrieve)
                self._writing.cancel()
            self._threads.dispose(self._file)

    async def _write_all(self, content: AsyncIterator[bytes]) -> None:
        pending: list[bytes] = []
        pending_bytes = 0
        async for data in content:
            pending.append(data)
            pending_bytes += len(data)
            self._sandbox.touch()
            if pending_bytes >= PIECE_BYTES or len(pending) >= _PENDING_CHUNKS:
                await self._written()
                self._writing = asyncio.create_task(self._write(pending), name="files:write")
                pending, pending_bytes = [], 0
        await self._written()
        if pending:
            await self._write(pending)

    async def _take_all(self, incoming: Incoming) -> None:
        await self._write([incoming.early])
        pipe = Guarded(Pipe())

        async def run(function: Callable[[], Progress]) -> Progress:
            return await self._threads.run(self._sandbox_id, function)

        def take(socket_fd: int) -> Progress:
            return self._file.use(lambda file: pipe.use(lambda open_pipe: file.take(incoming, socket_fd, open_pipe)))

        try:
            progress: Progress = "more"
            while progress != "ended":
                if progress == "blocked":
                    await incoming.readable()
                progress = await incoming.visit(run, take)
                self._sandbox.touch()
        finally:
            pipe.close()

    async def _written(self) -> None:
        """Waits for the piece that is being written, if there is one."""
        if self._writing is not None:
            await self._writing
            self._writing = None

    async def _write(self, pieces: list[bytes]) -> None:
        await self._run(lambda file: file.write(pieces))

    async def _run(self, function: Callable[[staged.StagedFile], None]) -> None:
        await self._threads.run(self._sandbox_id, lambda: self._file.use(function))


def _retrieve(task: asyncio.Task[None]) -> None:
    # What went wrong first is being raised already.
    if not task.cancelled():
        task.exception()


def _in_root(workload: Workload, function: Callable[[int], T]) -> T:
    root_fd = workload.open_root()
    try:
        return function(root_fd)
    finally:
        os.close(root_fd)


@asynccontextmanager
async def _reported(report: _Report, path: bytes, *, reading: bool = False) -> AsyncIterator[None]:
    """Turns OSErrors into typed ones and lets the event pair end with whatever goes wrong."""
    try:
        yield
    except OSError as error:
        problem = failure(error, path, reading=reading)
        report.finish(problem.message)
        raise problem from error
    except HiverError as error:
        report.finish(error.message)
        raise
    except BaseException:
        report.finish("interrupted")
        raise


def _shown_entry(prefix: bytes, entry: rooted.Entry) -> DirectoryEntry:
    return DirectoryEntry(
        name=shown(entry.name), path=shown(prefix + entry.name), is_dir=entry.is_directory, size=entry.size
    )
