"""Which store keeps a configuration's snapshots, and archives that are whole before they are used."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hiverd.contracts.errors import HiverError, InvalidError, NotFoundError, UnsupportedError
from hiverd.contracts.snapshot import SnapshotDamagedError
from hiverd.sandboxes.mounts import MountPlanner
from hiverd.sandboxes.snapshot_mounts import MountStore
from hiverd.sandboxes.snapshot_stores import CopyingStore, SnapshotStores, open_store
from hiverd.settings import SnapshotsSettings
from hiverd.testing.snapshot_harness import FIRST, get, noise, put
from hiverd.wire.config import SandboxConfig, decode_config
from support.egress import scripted
from support.snapshot_stores import flip
from support.upstreams import SocketUpstream


@pytest.fixture
async def stores(tmp_path: Path) -> AsyncIterator[SnapshotStores]:
    settings = SnapshotsSettings(path=tmp_path / "snapshots", max_mib=4)
    (tmp_path / "origin").mkdir()
    planner = MountPlanner([tmp_path / "origin"], environ={}, fuse=lambda: True)
    default = await open_store(settings, FIRST)
    stores = SnapshotStores(default, settings, planner, tmp_path / "spool")
    yield stores
    stores.close()
    await default.close()


def config_of(*mounts: dict[str, Any]) -> SandboxConfig:
    return decode_config(msgspec.json.encode({"fs": mounts, "snapshot": {"files": {"key": "demo"}}}))


async def test_without_a_mount_it_is_the_operators(stores: SnapshotStores) -> None:
    async with stores.chosen(config_of({"mount": "/a", "backend": "local"}), None, None) as store:
        assert store is stores.default


async def test_an_origin_holds_the_file(stores: SnapshotStores, tmp_path: Path) -> None:
    config = config_of({"mount": "/a", "backend": "local", "origin": str(tmp_path / "origin"), "internal": True})
    async with stores.chosen(config, "/a", None) as store:
        assert isinstance(store, MountStore)
        await put(store, "demo", b"\x1f\x8b123")
    assert [path.name for path in (tmp_path / "origin").iterdir()] == ["snapshot-demo.tar.gz"]
    with pytest.raises(NotFoundError):
        await stores.default.find("demo")


async def test_what_nobody_sees_is_with_the_operator(stores: SnapshotStores, tmp_path: Path) -> None:
    config = config_of({"mount": "/a", "backend": "local", "internal": True})
    async with stores.chosen(config, "/a", tmp_path / "volume") as store:
        assert store is stores.default


async def test_a_sandboxes_own_disk_gets_a_copy(stores: SnapshotStores, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    config = config_of({"mount": "/a", "backend": "local"})
    async with stores.chosen(config, "/a", volume) as store:
        assert isinstance(store, CopyingStore)
        await put(store, "demo", b"\x1f\x8b123")
        copy = volume / "mounts/a/snapshot-demo.tar.gz"
        assert copy.read_bytes().startswith(b"\x1f\x8b123")
        copy.write_bytes(b"\x1f\x8bplanted")
        assert await get(store, "demo") == b"\x1f\x8b123", "the agent's file is not believed"
        copy.unlink()
        (volume / "mounts/a").rmdir()
        await put(store, "demo", b"\x1f\x8b456")
    assert await get(stores.default, "demo") == b"\x1f\x8b456", "a copy that fails is no reason to lose the snapshot"


async def test_a_remote_mount_is_asked_directly(stores: SnapshotStores) -> None:
    with SocketUpstream(scripted(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")) as service:
        host = f"http://{service.address}"
        config = config_of({"mount": "/a", "backend": "external", "host": host, "internal": True})
        async with stores.chosen(config, "/a", None) as store:
            assert isinstance(store, MountStore)
            with pytest.raises(HiverError, match="mount that keeps the snapshot"):
                await asyncio.wait_for(store.find("demo"), 60)
        assert service.connections > 0


async def test_what_is_wrong_with_another_mount_does_not_matter(stores: SnapshotStores, tmp_path: Path) -> None:
    origin = {"backend": "local", "origin": str(tmp_path / "origin")}
    gone = {"backend": "local", "origin": str(tmp_path / "origin/gone")}
    config = config_of({"mount": "/gone", **gone}, {"mount": "/a", **origin})
    async with stores.chosen(config, "/a", None) as store:
        await put(store, "demo", b"kept")
    with pytest.raises(InvalidError, match=r"fs\[0\]\.origin"):
        async with stores.chosen(config, "/gone", None):
            pass


async def test_an_unknown_mount_is_named(stores: SnapshotStores) -> None:
    with pytest.raises(InvalidError) as failed:
        async with stores.chosen(config_of({"mount": "/a", "backend": "local"}), "/b", None):
            pass
    assert failed.value.field == "snapshot.files.mount"


async def test_fetched_is_compared_first(stores: SnapshotStores, tmp_path: Path) -> None:
    data = noise(3 << 20)
    info = await put(stores.default, "demo", data)
    async with stores.fetched(stores.default, "demo") as fetched:
        await stores.default.delete("demo")
        assert fetched.info == info
        assert fetched.file.read() == data, "deleting it meanwhile does no harm"
    info = await put(stores.default, "demo", data)
    [path] = (tmp_path / "snapshots/demo").iterdir()
    flip(path)
    with pytest.raises(SnapshotDamagedError):
        async with stores.fetched(stores.default, "demo"):
            pytest.fail("damaged data must not be handed out")
    with pytest.raises(NotFoundError):
        async with stores.fetched(stores.default, "other"):
            pass


async def test_fetched_from_afar(stores: SnapshotStores, tmp_path: Path) -> None:
    config = config_of({"mount": "/a", "backend": "local", "origin": str(tmp_path / "origin")})
    async with stores.chosen(config, "/a", None) as store:
        await put(store, "demo", noise(1 << 20))
        async with stores.fetched(store, "demo") as fetched:
            assert fetched.file.read() == noise(1 << 20)
        assert list((tmp_path / "spool").iterdir()) == []
        await put(store, "demo", noise(5 << 20))
        with pytest.raises(HiverError, match="max_mib"):
            async with stores.fetched(store, "demo"):
                pass


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (SnapshotsSettings(store="nothing"), "unknown snapshot store"),
        (SnapshotsSettings(store="remote"), "snapshots.url"),
        (SnapshotsSettings(path=Path("/proc/nothing")), "snapshots.path"),
    ],
)
async def test_what_cannot_be_is_told_at_the_start(settings: SnapshotsSettings, said: str) -> None:
    with pytest.raises((InvalidError, UnsupportedError), match=said):
        await open_store(settings, FIRST)
