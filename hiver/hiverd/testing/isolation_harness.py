"""What the isolation conformance suite needs of a plug-in, and small helpers to drive one."""

from __future__ import annotations

import abc
import asyncio
import itertools
import shutil
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from hiverd.contracts.errors import SandboxGoneError
from hiverd.contracts.isolation import ExecProcess, ExecSpec, Image, Isolation, Stream, Workload, WorkloadSpec

_T = TypeVar("_T")

DEADLINE_SECONDS = 30.0


class Output(NamedTuple):
    """A finished command."""

    code: int
    stdout: bytes
    stderr: bytes


class Harness(abc.ABC):
    """One plug-in on folders of its own, which several instances may use one after the other, as server restarts do.

    `image` must name an image with a POSIX `/bin/sh` and the usual small programs.
    """

    image: str = "host"
    has_network_namespace: bool = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._slots = itertools.count()

    @abc.abstractmethod
    def build(self) -> Isolation:
        """A new instance, not started."""

    @asynccontextmanager
    async def started(self) -> AsyncIterator[Isolation]:
        """A started instance; closed on leaving, with its sandboxes left alone."""
        isolation = self.build()
        await isolation.start()
        try:
            yield isolation
        finally:
            await isolation.close()

    def spec(self, image: Image, **changes: Any) -> WorkloadSpec:
        """A small sandbox with a folder of its own."""
        sandbox_id = str(uuid.uuid4())
        volume = self.folder / "volumes" / sandbox_id
        volume.mkdir(parents=True, mode=0o700)
        spec = WorkloadSpec(
            sandbox_id=sandbox_id,
            key=sandbox_id,
            slot=next(self._slots),
            image=image,
            volume=volume,
            hostname="box",
            cpu=1.0,
            memory_bytes=256 * 1024 * 1024,
            pids_max=128,
            argv=(),
            tty=False,
            cwd="/",
            env={},
        )
        return msgspec.structs.replace(spec, **changes)

    @asynccontextmanager
    async def sandbox(self, isolation: Isolation, **changes: Any) -> AsyncIterator[Workload]:
        """A running sandbox, destroyed on leaving."""
        image = await isolation.resolve_image(self.image, lambda _: None)
        async with self.created(isolation, self.spec(image, **changes)) as workload:
            await workload.begin()
            yield workload

    @asynccontextmanager
    async def created(self, isolation: Isolation, spec: WorkloadSpec) -> AsyncIterator[Workload]:
        """A sandbox before its first instruction, destroyed on leaving."""
        workload = None
        try:
            workload = await isolation.create(spec)
            yield workload
        finally:
            state: Mapping[str, Any] | None = workload.state if workload is not None else None
            if workload is not None:
                await workload.close()
            await isolation.destroy(spec.sandbox_id, state)
            shutil.rmtree(spec.volume, ignore_errors=True)


async def start(workload: Workload, *argv: str, **options: Any) -> ExecProcess:
    """Starts a command; a single argument is a shell's."""
    words = ("/bin/sh", "-c", argv[0]) if len(argv) == 1 else argv
    return await workload.exec(ExecSpec(exec_id=str(uuid.uuid4()), argv=words, **options))


async def run(workload: Workload, *argv: str, **options: Any) -> Output:
    """Runs a command to its end."""
    process = await start(workload, *argv, **options)
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            pieces = await collect(process)
            return Output(await process.wait(), pieces["stdout"], pieces["stderr"])
    finally:
        await process.close()


async def collect(process: ExecProcess) -> dict[Stream, bytes]:
    """All output, by stream."""
    pieces: dict[Stream, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
    async for stream, data in process.output():
        pieces[stream] += data
    return {stream: bytes(data) for stream, data in pieces.items()}


async def read_until(output: AsyncIterator[bytes] | AsyncIterator[tuple[Stream, bytes]], wanted: bytes) -> bytes:
    """Reads a live stream until `wanted` has been seen; pieces may be bytes or (stream, bytes)."""
    seen = b""
    async with asyncio.timeout(DEADLINE_SECONDS):
        async for piece in output:
            seen += piece[1] if isinstance(piece, tuple) else piece
            if wanted in seen:
                return seen
    raise AssertionError(f"the stream ended without {wanted!r}: {seen!r}")


async def eventually(look: Callable[[], Awaitable[_T]], accept: Callable[[_T], bool] = bool) -> _T:
    """Looks again and again until what it sees is accepted; the last sight is in the error."""
    last: _T
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while True:
                last = await look()
                if accept(last):
                    return last
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"never as wanted; last seen: {last!r}") from None


async def has_gone(workload: Workload) -> bool:
    """Whether a new command is refused because the sandbox has ended."""
    try:
        await run(workload, "true")
    except SandboxGoneError:
        return True
    return False
