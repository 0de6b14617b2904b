"""Snapshot stores on places of a test's own, for the conformance suite."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from hiver_snapshots.local import LocalStore
from hiver_snapshots.remote import RemoteStore
from hiver_snapshots.uploads import Place
from hiverd.contracts.filesystem import FileSystem
from hiverd.contracts.snapshot import SnapshotInfo, SnapshotStore
from hiverd.sandboxes.snapshot_mounts import Locks, MountStore
from hiverd.sandboxes.snapshot_places import FolderPlace, RemotePlace
from hiverd.testing.snapshot_harness import FIRST, KEEP, StoreHarness, pieces

_DIES: Final = """
import asyncio, json, os, signal, sys
from importlib import import_module

module, name, options, key = sys.argv[1:]

async def content():
    yield b"half of it" * 300_000
    yield b"half of it" * 300_000  # the first is written by the time that this one is
    print("written", flush=True)
    await asyncio.Event().wait()

async def main():
    store = getattr(import_module(module), name)(json.loads(options))
    await store.put(key, content())

asyncio.run(main())
"""


def options_for(
    path: Path | str = "", url: str = "", keep: int = KEEP, instance: str = FIRST, **more: Any
) -> dict[str, Any]:
    """What the server gives to a store."""
    return {"keep": keep, "path": str(path), "url": url, "instance": instance, **more}


def die_in_mid_put(store: type[SnapshotStore], options: Mapping[str, Any], key: str = "demo") -> None:
    """Another process puts half an archive, and is killed."""
    import msgspec

    argv = [sys.executable, "-P", "-c", textwrap.dedent(_DIES), store.__module__, store.__name__]
    process = subprocess.Popen(
        [*argv, msgspec.json.encode(options).decode(), key], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


class LocalHarness(StoreHarness):
    can_fill = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._limit: tuple[int, int] | None = None

    def build(self, keep: int = KEEP, *, instance: str = FIRST) -> SnapshotStore:
        return LocalStore(options_for(self.folder, keep=keep, instance=instance))

    async def damage(self, info: SnapshotInfo) -> None:
        [path] = (self.folder / info.key).glob(f"{info.version}.*")
        flip(path)

    async def leftovers(self) -> list[str]:
        return stray(self.folder)

    async def abandon(self) -> None:
        await asyncio.to_thread(die_in_mid_put, LocalStore, options_for(self.folder))
        assert len(stray(self.folder)) == 1


class FileUrlHarness(StoreHarness):
    """`file://`, as any other place that fsspec reaches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def options(self, keep: int = KEEP, instance: str = FIRST) -> dict[str, Any]:
        return options_for(url=f"file://{self.folder}", keep=keep, instance=instance)

    def build(self, keep: int = KEEP, *, instance: str = FIRST) -> SnapshotStore:
        return RemoteStore(self.options(keep, instance))

    async def damage(self, info: SnapshotInfo) -> None:
        [marker] = (self.folder / info.key).glob(f"{info.version}.*.snapshot")
        flip(self.folder / info.key / data_name(marker.name))

    async def leftovers(self) -> list[str]:
        await settled()
        names = [str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()]
        empty = [str(path) for path in self.folder.iterdir() if path.is_dir() and not list(path.iterdir())]
        return [*unmarked(names), *empty]

    async def abandon(self) -> None:
        await asyncio.to_thread(die_in_mid_put, RemoteStore, self.options())
        assert len(await self.leftovers()) == 1


class UrlHarness(StoreHarness):
    """Any URL, looked at with fsspec's own synchronous calls."""

    def __init__(self, url: str, **options: Any) -> None:
        self.url = url
        self.options = options
        own = {name: value for name, value in options.items() if name != "memory"}
        place = Place(url, own)
        self.files, self.root = place.files, place.root

    def build(self, keep: int = KEEP, *, instance: str = FIRST) -> SnapshotStore:
        return RemoteStore(options_for(url=self.url, keep=keep, instance=instance, **self.options))

    def names(self) -> list[str]:
        self.files.invalidate_cache()
        return [str(name).removeprefix(self.root + "/") for name in self.files.find(self.root)]

    async def damage(self, info: SnapshotInfo) -> None:
        def change() -> None:
            [marker] = [name for name in self.names() if name.startswith(f"{info.key}/{info.version}.")]
            path = f"{self.root}/{info.key}/{data_name(marker)}"
            data = bytearray(self.files.cat_file(path))
            data[len(data) // 2] ^= 1
            self.files.pipe_file(path, bytes(data))

        await asyncio.to_thread(change)

    async def leftovers(self) -> list[str]:
        await settled()
        return unmarked(await asyncio.to_thread(self.names))

    async def abandon(self) -> None:
        """As a server leaves it that is killed between the archive and its marker."""

        def leave() -> None:
            self.files.pipe_file(f"{self.root}/demo/data-{FIRST}-0123456789abcdef.tar", b"half of it")

        await asyncio.to_thread(leave)


async def settled() -> None:
    """A cancelled put cleans up in a thread of its own after its caller has gone on."""
    await asyncio.sleep(0)


def flip(path: Path) -> None:
    """Changes one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def stray(folder: Path) -> list[str]:
    """Files that are no versions of the local store's, and empty folders."""
    found = [path for path in folder.rglob("*") if path.is_file() and not re.match(r"\d{8}T\d{12}Z-", path.name)]
    found += [path for path in folder.iterdir() if path.is_dir() and not list(path.iterdir())]
    return [str(path.relative_to(folder)) for path in found]


def data_name(marker: str) -> str:
    """The archive's name out of its marker's."""
    return "data-" + marker.removesuffix(".snapshot").partition(".data-")[2]


def unmarked(names: list[str]) -> list[str]:
    """Archives without a marker, markers without an archive, and whatever else there is."""
    markers = {f"{name.rpartition('/')[0]}/{data_name(name)}": name for name in names if name.endswith(".snapshot")}
    archives = {name for name in names if name.rpartition("/")[2].startswith("data-")}
    return sorted(set(names) - {name for pair in markers.items() if pair[0] in archives for name in pair})


class FolderMountHarness(StoreHarness):
    """A mount that is a folder of this host."""

    keeps_one = True

    def __init__(self, folder: Path, spool: Path) -> None:
        self.folder = folder
        self.spool = spool
        self.locks = Locks()
        self.threads = ThreadPoolExecutor(4)
        folder.mkdir(parents=True, exist_ok=True)

    def build(self, keep: int = KEEP, *, instance: str = FIRST) -> SnapshotStore:
        return MountStore(FolderPlace(self.folder, self.threads), self.spool, self.locks, "a")

    async def damage(self, info: SnapshotInfo) -> None:
        [path] = self.folder.glob(f"snapshot-{info.key}.tar*")
        flip(path)

    async def leftovers(self) -> list[str]:
        found = [str(path) for path in self.folder.iterdir() if not path.name.startswith("snapshot-")]
        return found + [str(path) for path in self.spool.iterdir()] if self.spool.exists() else found

    async def abandon(self) -> None:
        (self.folder / ".hiver-snapshot-0123456789abcdef").write_bytes(b"half of it")


class BackendMountHarness(StoreHarness):
    """A mount of any backend."""

    keeps_one = True

    def __init__(self, backend: Callable[[], FileSystem], spool: Path) -> None:
        self.backend = backend
        self.spool = spool
        self.locks = Locks()

    def build(self, keep: int = KEEP, *, instance: str = FIRST) -> SnapshotStore:
        return _ClosingStore(self.backend(), self.spool, self.locks)

    @asynccontextmanager
    async def files(self) -> AsyncIterator[FileSystem]:
        files = self.backend()
        await files.open()
        try:
            yield files
        finally:
            await files.close()

    async def damage(self, info: SnapshotInfo) -> None:
        async with self.files() as files:
            [path] = [entry.path async for entry in files.list_directory("/") if entry.path.startswith("/snapshot-")]
            data = bytearray(b"".join([piece async for piece in files.read(path, 0, None)]))
            data[len(data) // 2] ^= 1
            await files.write(path, pieces(bytes(data)), size=len(data), expected_version=None)

    async def leftovers(self) -> list[str]:
        async with self.files() as files:
            found = [entry.path async for entry in files.list_directory("/")]
        return [path for path in found if not path.startswith("/snapshot-")]


class _ClosingStore(MountStore):
    def __init__(self, files: FileSystem, spool: Path, locks: Locks) -> None:
        super().__init__(RemotePlace(files), spool, locks, "b")
        self._files = files

    async def start(self) -> None:
        await self._files.open()

    async def close(self) -> None:
        await self._files.close()
