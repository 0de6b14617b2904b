"""A hostile root without a container, and an HTTP server over the file API."""

from __future__ import annotations

import asyncio
import os
import time
import warnings
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import uvicorn
from litestar import Litestar
from litestar.di import Provide
from litestar.exceptions import LitestarDeprecationWarning

from hiverd.api.errors import handle_error
from hiverd.api.files import FilesController
from hiverd.contracts.isolation import Workload
from hiverd.files.access import FileAccess
from hiverd.sandboxes.sandbox import Sandbox
from hiverd.wire.events import Event
from unit.files.namespaced import NamespacedRoot


class RecordedEvents:
    """An event sink that remembers."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def wants(self, event_type: type[Event]) -> bool:
        return True

    def emit(self, event: Event) -> int:
        self.events.append(event)
        return len(self.events)


class FolderWorkload:
    """As much of a workload as the file API sees."""

    sandbox_id = "sandbox-1"

    def __init__(self, root: Path, ids: tuple[int, int]) -> None:
        self._root = root
        self.root_ids = ids

    def open_root(self) -> int:
        return os.open(self._root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


class FakeSandbox(Sandbox):
    """As much of a sandbox as the file API sees."""

    def __init__(self, workload: object, mounts: Sequence[tuple[str, str]] = ()) -> None:
        self.recorded = RecordedEvents()
        self.events = cast("Any", self.recorded)
        self.touched = 0
        self._fake = cast("Workload", workload)
        self._mounts = tuple(mounts)

    @property
    def workload(self) -> Workload:
        return self._fake

    @property
    def mounts(self) -> Sequence[tuple[str, str]]:
        return self._mounts

    def touch(self) -> None:
        self.touched += 1


class FolderSandbox(FakeSandbox):
    """A sandbox whose root is a folder of the test."""

    def __init__(self, root: Path, ids: tuple[int, int] = (0, 0), mounts: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(FolderWorkload(root, ids), mounts)
        self.root = root


class NamespacedWorkload:
    sandbox_id = "sandbox-2"

    def __init__(self, inside: NamespacedRoot) -> None:
        self.open_root = inside.open_root
        self.root_ids = inside.root_ids


def make_app(sandbox: FakeSandbox, files: FileAccess) -> Litestar:
    with warnings.catch_warnings():
        # Dependencies that are matched by name; the whole server's composition decides about that.
        warnings.simplefilter("ignore", LitestarDeprecationWarning)
        return Litestar(
            [FilesController],
            dependencies={
                "sandbox": Provide(lambda: sandbox, sync_to_thread=False, use_cache=False),
                "files": Provide(lambda: files, sync_to_thread=False),
            },
            exception_handlers={Exception: cast("Callable[..., Any]", handle_error)},
        )


@asynccontextmanager
async def client_of(sandbox: FakeSandbox) -> AsyncIterator[httpx.AsyncClient]:
    """A client whose base address is that of the sandbox."""
    files = FileAccess()
    transport = httpx.ASGITransport(make_app(sandbox, files))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test/sandbox/the-id/v1/key") as client:
            yield client
    finally:
        files.close()


@asynccontextmanager
async def serving(sandbox: FakeSandbox, files: FileAccess) -> AsyncIterator[str]:
    """A real server on a real socket; yields the sandbox's base address."""
    config = uvicorn.Config(
        make_app(sandbox, files), port=0, http="httptools", lifespan="off", log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(), name="server")
    try:
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/sandbox/the-id/v1/key"
    finally:
        server.should_exit = server.force_exit = True
        await task


async def eventually(condition: Callable[[], bool], seconds: float = 5) -> None:
    """Until `condition` holds. AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.01)
