"""When sandboxes are captured, and what becomes of their files when a store or a server fails in the middle."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from hiverd.contracts.errors import BackendError, UnavailableError
from hiverd.contracts.isolation import Mount, RootChanges
from hiverd.contracts.snapshot import SnapshotInfo, SnapshotStore
from hiverd.sandboxes import snapshotting
from hiverd.sandboxes.snapshot_plan import FilesPlan, capture_at_end_of, parts_of, restore_of
from hiverd.wire.config import SandboxConfig, Snapshot, SnapshotFiles, config_of_document
from hiverd.wire.requests import SnapshotRequest
from support.archives import extract
from support.waiting import until_async


class FailingStore(SnapshotStore):
    """Hands everything on to another one, or fails, or waits for ever."""

    name: ClassVar[str] = "failing"

    def __init__(self, behind: SnapshotStore) -> None:
        super().__init__({})
        self.behind = behind
        self.failing = False
        self.waiting: asyncio.Event | None = None
        self.puts = 0

    async def put(self, key: str, content: AsyncIterator[bytes]) -> SnapshotInfo:
        self.puts += 1
        if self.waiting is not None:
            self.waiting.set()
            await asyncio.Event().wait()
        if self.failing:
            await anext(content)
            raise UnavailableError("the store is away")
        return await self.behind.put(key, content)

    def get(self, key: str, version: str | None = None) -> AsyncIterator[bytes]:
        return self.behind.get(key, version)

    def list(self, key: str | None = None) -> AsyncIterator[SnapshotInfo]:
        return self.behind.list(key)

    async def delete(self, key: str, version: str | None = None) -> None:
        await self.behind.delete(key, version)


def config(key: str = "snap", *, write: bool = True) -> SandboxConfig:
    return config_of_document({"fs": [], "snapshot": {"files": {"key": key, "write_on_shutdown": write}}})


def with_store(core: Any) -> FailingStore:
    store = FailingStore(core.snapshot_stores.default)
    core.snapshot_stores.default = store
    return store


async def filled(core: Any, key: str, content: str) -> Any:
    """A sandbox of that key which has written a file."""
    sandbox, _ = await core.obtain(key, config)
    upper = sandbox.spec.volume / "fake-upper"
    upper.mkdir(exist_ok=True)
    (upper / "file").write_text(content)
    return sandbox


async def stored(core: Any, tmp_path: Path, key: str = "snap") -> str:
    """What the file holds in the newest snapshot."""
    archive = tmp_path / f"archive{os.urandom(4).hex()}"
    archive.write_bytes(b"".join([piece async for piece in core.snapshot_stores.default.get(key)]))
    target = archive.with_suffix(".out")
    extract(archive, target)
    return (target / "file").read_text()


async def test_a_store_that_fails_at_the_end_gets_the_archive_later(open_core, tmp_path):
    async with open_core() as core:
        store = with_store(core)
        sandbox = await filled(core, "box", "precious")
        store.failing = True
        with pytest.raises(BackendError, match=r"the store is away.*snapshots-failed"):
            await core.manager.shutdown(sandbox, tell=True)
        assert core.manager.by_key("box") is None
        kept = sorted((tmp_path / "snapshots-failed").iterdir())
        assert [path.name.partition("~")[0] for path in kept] == ["snap", "snap"]
        assert {stat.S_IMODE(path.stat().st_mode) for path in kept} == {0o600}
        await core.snapshots.offer_again()
        assert sorted((tmp_path / "snapshots-failed").iterdir()) == kept
    async with open_core() as core:
        core.housekeeping.start()

        async def offered() -> bool:
            return not list((tmp_path / "snapshots-failed").iterdir())

        await until_async(offered, seconds=10, what="the archive to be stored")
        assert await stored(core, tmp_path) == "precious"


async def test_what_was_kept_aside_never_replaces_something_newer(open_core, tmp_path):
    async with open_core() as core:
        store = with_store(core)
        sandbox = await filled(core, "box", "old")
        store.failing = True
        await core.manager.shutdown(sandbox)
        store.failing = False
        await core.manager.shutdown(await filled(core, "box", "new"))
        puts = store.puts
        for _ in range(2):
            await core.snapshots.offer_again()
        assert store.puts == puts
        assert await stored(core, tmp_path) == "new"
        assert len(list((tmp_path / "snapshots-failed").iterdir())) == 2


async def test_the_previous_snapshot_stays_when_a_capture_fails(open_core, tmp_path):
    async with open_core() as core:
        store = with_store(core)
        sandbox = await filled(core, "box", "first")
        request = SnapshotRequest(files=SnapshotFiles("snap"))
        assert (await core.snapshots.on_demand(sandbox, request)).files.captured
        (sandbox.spec.volume / "fake-upper" / "file").write_text("second")
        store.failing = True
        with pytest.raises(UnavailableError, match="the store is away"):
            await core.snapshots.on_demand(sandbox, request)
        assert await stored(core, tmp_path) == "first"
        workload = core.isolation.workloads[sandbox.id]
        assert workload.pauses == workload.resumes == 2
        await sandbox.events.flushed()
        events = [event async for event in _events(core, sandbox)]
        assert any("the store is away" in event for event in events)


async def _events(core: Any, sandbox: Any) -> AsyncIterator[str]:
    for row in await core.database.fetch("SELECT body FROM events WHERE sandbox_id = ? ORDER BY id", (sandbox.id,)):
        yield bytes(row[0]).decode()


async def test_a_server_killed_while_it_captures_does_it_again_before_anything_goes(open_core, tmp_path):
    async with open_core() as core:
        store = with_store(core)
        sandbox = await filled(core, "box", "precious")
        store.waiting = asyncio.Event()
        ending = asyncio.create_task(core.manager.shutdown(sandbox))
        await store.waiting.wait()
        assert core.isolation.destroyed == []
        ending.cancel()
    async with open_core() as core:
        await core.manager.adopt_all()
        again = core.manager.by_key("box")
        await again.destroyed.wait()
        assert await stored(core, tmp_path) == "precious"
        assert core.isolation.destroyed == [again.id]


async def test_what_is_captured_is_not_captured_again_when_only_half_of_it_is_left(open_core, tmp_path):
    async with open_core() as core:
        sandbox = await filled(core, "box", "precious")

        async def fail(step: str) -> None:
            if step == "destroy":
                (sandbox.spec.volume / "fake-upper" / "file").unlink(missing_ok=True)
                await asyncio.Event().wait()

        core.isolation.hook = fail
        ending = asyncio.create_task(core.manager.shutdown(sandbox))

        async def captured() -> bool:
            return bool([info async for info in core.snapshot_stores.default.list("snap")])

        await until_async(captured, seconds=10, what="the capture")
        await until_async(lambda: _is_gone(sandbox), seconds=10, what="the removal to begin")
        ending.cancel()
    core.isolation.hook = None
    async with open_core() as core:
        await core.manager.adopt_all()
        await core.manager.by_key("box").destroyed.wait()
        assert await stored(core, tmp_path) == "precious"


async def _true(value: bool) -> bool:
    return value


async def _is_gone(sandbox: Any) -> bool:
    return not (sandbox.spec.volume / "fake-upper" / "file").exists()


async def test_a_full_disk_is_waited_for(open_core, tmp_path, monkeypatch):
    """The sandbox keeps its key and its files until there is room for the archive."""
    full, refused = True, 0

    async def no_room(self: Any) -> Any:
        nonlocal refused
        if full:
            refused += 1
            raise snapshotting._no_space()
        return await spool_file(self)

    spool_file = snapshotting.Snapshots._spool_file
    monkeypatch.setattr(snapshotting.Snapshots, "_spool_file", no_room)
    monkeypatch.setattr("hiverd.sandboxes.removal.AWAY_RETRY_SECONDS", 0.01)
    async with open_core() as core:
        sandbox = await filled(core, "box", "precious")
        ending = asyncio.create_task(core.manager.shutdown(sandbox))
        await until_async(lambda: _true(refused > snapshotting.CAPTURE_TRIES), seconds=10, what="attempts")
        assert core.manager.by_key("box") is sandbox
        assert (sandbox.spec.volume / "fake-upper" / "file").exists()
        full = False
        await ending
        assert await stored(core, tmp_path) == "precious"


async def test_a_capture_that_cannot_be_made_is_given_up_and_told(open_core, monkeypatch):
    async def nothing(spec: Any, state: Any) -> None:
        return None

    monkeypatch.setattr("hiverd.sandboxes.removal.DESTROY_RETRY_SECONDS", (0.01,))
    async with open_core() as core:
        sandbox = await filled(core, "box", "precious")
        core.isolation.root_changes = nothing
        with pytest.raises(BackendError, match="last snapshot could not be made"):
            await core.manager.shutdown(sandbox, tell=True)
        assert core.manager.by_key("box") is None


async def test_captures_of_one_sandbox_wait_for_one_another(open_core, tmp_path):
    async with open_core() as core:
        sandbox = await filled(core, "box", "precious")
        requests = [SnapshotRequest(files=SnapshotFiles(f"k{number}")) for number in range(4)]
        workload = core.isolation.workloads[sandbox.id]
        at_once: list[int] = []

        async def pause() -> frozenset[int]:
            at_once.append(workload.pauses - workload.resumes)
            workload.pauses += 1
            return frozenset()

        workload.pause = pause
        await asyncio.gather(*(core.snapshots.on_demand(sandbox, request) for request in requests))
        assert at_once == [0, 0, 0, 0]


def test_what_a_configuration_says():
    new = Snapshot(files=SnapshotFiles("k", include=("/a",), mount="/m"))
    assert restore_of(new) == FilesPlan("k", ("/a",), "/m")
    assert capture_at_end_of(new) is None
    write = Snapshot(files=SnapshotFiles("k", write_on_shutdown=True))
    assert capture_at_end_of(write) == FilesPlan("k")
    assert capture_at_end_of(Snapshot(restore_key="r", include=("/a",))) == FilesPlan("r", ("/a",))
    assert capture_at_end_of(Snapshot(restore_key="r", write_key="w")) == FilesPlan("w")
    assert restore_of(Snapshot(write_key="w")) is None
    assert restore_of(None) is capture_at_end_of(None) is None


def test_parts():
    changes = RootChanges(upper="/volume/upper", first_id=100, id_count=10)
    mounts = (Mount(target="/workspace", source="/w"), Mount(target="/workspace/in", source="/i"))

    def places(*include: str) -> dict[str, tuple[str, ...]]:
        return {part.place: part.covered for part in parts_of(changes, mounts, include)}

    everywhere = ("workspace", "workspace/in")
    assert places() == {"": everywhere}
    assert places("/root/**") == {"": everywhere}
    assert places("/workspace/in/x/*") == {"": everywhere, "workspace": ("workspace/in",), "workspace/in": ()}
    assert places("/**") == {"": everywhere, "workspace": ("workspace/in",), "workspace/in": ()}
