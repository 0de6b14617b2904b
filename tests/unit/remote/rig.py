"""A remote folder, driven as a mount does it: by threads that call `Content`, with the loop in another."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

from hiverd.contracts.filesystem import FileSystem
from hiverd.remote.calls import SyncCall
from hiverd.remote.folder import Pending, RemoteFolder
from hiverd.remote.settings import RemoteSettings

T = TypeVar("T")

QUICK = RemoteSettings(quiet_seconds=0.05, longest_seconds=0.2, retry_seconds=0.02, longest_retry_seconds=0.1)
LATE = RemoteSettings(quiet_seconds=3600, longest_seconds=3600)
"""Nothing is uploaded unless a test asks for it."""


class Mount:
    """What the FUSE side does with `Content` and the folder, with paths of the mount."""

    def __init__(self, base: Path, backend: FileSystem, settings: RemoteSettings, loop: asyncio.AbstractEventLoop):
        self.backend = backend
        self.loop = loop
        self.calls: list[SyncCall] = []
        self.changed: list[str] = []
        self.content = RemoteFolder(
            base, backend, loop=loop, record=self.calls.append, settings=settings, changed=self.changed.append
        )
        self.tree = self.content.tree_path
        self.recovered = self.run(self.content.start())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def on_loop(self, work: Callable[[], T]) -> T:
        async def inner() -> T:
            return work()

        return self.run(inner())

    def stop(self) -> None:
        self.run(self.content.stop())

    def drain(self, seconds: float = 20) -> Pending:
        return self.run(self.content.drain(seconds))

    def real(self, path: str) -> Path:
        return self.tree / path.lstrip("/")

    def look_up(self, path: str) -> None:
        """Component by component, as the kernel does it."""
        parts = path.strip("/").split("/")
        for count in range(1, len(parts) + 1):
            self.content.look_up("/" + "/".join(parts[:count]))

    def exists(self, path: str) -> bool:
        self.look_up(path)
        return os.path.lexists(self.real(path))

    def names(self, path: str = "/") -> list[str]:
        if path != "/":
            self.look_up(path)
        self.content.list(path)
        return sorted(os.listdir(self.real(path)))

    def open(self, path: str, flags: int = os.O_RDONLY) -> Handle:
        self.look_up(path)
        write = bool(flags & (os.O_WRONLY | os.O_RDWR))
        if flags & os.O_CREAT and not self.real(path).exists():
            fd = os.open(self.real(path), flags, 0o644)
            self.content.created(path)
            return Handle(self, path, fd, unchanged=False)
        if not os.path.lexists(self.real(path)):
            raise FileNotFoundError(path)
        unchanged = self.content.open(path, write=write, truncate=bool(flags & os.O_TRUNC))
        return Handle(self, path, os.open(self.real(path), flags & ~os.O_CREAT), unchanged=unchanged)

    def read(self, path: str) -> bytes:
        with self.open(path) as handle:
            return handle.read_all()

    def write(self, path: str, data: bytes) -> None:
        with self.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as handle:
            handle.write(data)

    def unlink(self, path: str) -> None:
        self.look_up(path)
        self.content.unlink(path)
        self.real(path).unlink()

    def rename(self, source: str, target: str) -> None:
        self.look_up(source)
        self.look_up(target)
        self.content.rename(source, target)
        self.real(source).rename(self.real(target))

    def mkdir(self, path: str) -> None:
        self.look_up(path)
        self.content.make_directory(path)
        self.real(path).mkdir()

    def rmdir(self, path: str) -> None:
        self.look_up(path)
        self.content.list(path)
        self.content.remove_directory(path)
        self.real(path).rmdir()

    def symlink(self, target: str, path: str) -> None:
        self.look_up(path)
        self.content.symlink(path, target)
        self.real(path).symlink_to(target)

    def paired(self) -> bool:
        """Each request has exactly one response."""
        asked = [call.number for call in self.calls if call.duration_seconds is None]
        answered = [call.number for call in self.calls if call.duration_seconds is not None]
        return sorted(asked) == sorted(answered) and len(set(asked)) == len(asked)


class Handle:
    def __init__(self, mount: Mount, path: str, fd: int, *, unchanged: bool) -> None:
        self.mount = mount
        self.path = path
        self.fd = fd
        self.unchanged = unchanged
        self.written = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, offset: int, size: int) -> bytes:
        self.mount.content.read(self.path, offset, size)
        return os.pread(self.fd, size, offset)

    def read_all(self, step: int = 128 << 10) -> bytes:
        pieces, offset = [], 0
        while piece := self.read(offset, step):
            pieces.append(piece)
            offset += len(piece)
        return b"".join(pieces)

    def write(self, data: bytes, offset: int = 0) -> None:
        self.mount.content.modify(self.path)
        self.written = True
        os.pwrite(self.fd, data, offset)

    def truncate(self, size: int) -> None:
        self.mount.content.modify(self.path)
        self.written = True
        os.ftruncate(self.fd, size)

    def close(self) -> None:
        named = os.fstat(self.fd).st_nlink > 0
        os.close(self.fd)
        if named:
            self.mount.content.close(self.path, written=self.written)


@contextmanager
def running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="loop", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


@contextmanager
def mounted(base: Path, backend: FileSystem, settings: RemoteSettings = QUICK) -> Iterator[Mount]:
    with running_loop() as loop:
        mount = Mount(base, backend, settings, loop)
        try:
            yield mount
        finally:
            mount.stop()
