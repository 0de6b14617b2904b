# ruff: noqa: S101 -- a test suite
"""Conformance of storing and reading archives: whole or not at all."""

from __future__ import annotations

import asyncio
import hashlib
from datetime import UTC, datetime, timedelta

import pytest

from hiverd.contracts.errors import NotFoundError
from hiverd.contracts.snapshot import SnapshotStore, version_time

from .snapshot_harness import DEADLINE_SECONDS, SECOND, StoreHarness, get, held, listed, noise, pieces, put

KEYS = ("demo", ".hidden", "-rf", "a..b", "A_b-C.9", "0", "x" * 64, "data-x", "demo.tar.gz")


class SnapshotWholeSuite:
    """Uses the fixtures `harness` and `store`."""

    @pytest.mark.parametrize("size", [0, 1, 1000, 100_000, 3 << 20])
    async def test_what_was_put_comes_back(self, store: SnapshotStore, size: int) -> None:
        data = noise(size)
        before = datetime.now(UTC) - timedelta(seconds=2)
        info = await put(store, "demo", data)
        assert (info.key, info.bytes, info.sha256) == ("demo", size, hashlib.sha256(data).hexdigest())
        assert before <= info.created_at <= datetime.now(UTC) + timedelta(seconds=2)
        assert version_time(info.version) is not None
        assert await get(store, "demo") == data
        assert await get(store, "demo", info.version) == data
        assert await listed(store, "demo") == [info]
        assert await store.find("demo") == info

    @pytest.mark.parametrize("head", [b"\x28\xb5\x2f\xfd", b"\x1f\x8b\x08"])
    async def test_archives_of_both_kinds(self, store: SnapshotStore, head: bytes) -> None:
        data = head + noise(5000)
        await put(store, "demo", data)
        assert await get(store, "demo") == data

    async def test_pieces_of_all_sizes(self, store: SnapshotStore) -> None:
        content = [b"", b"a", b"", b"bc" * 700_000, b"d", b"", noise(10), b""]
        await store.put("demo", pieces(*content))
        assert await get(store, "demo") == b"".join(content)

    async def test_a_big_one(self, store: SnapshotStore, harness: StoreHarness) -> None:
        block = noise(1 << 20)
        count = harness.big_bytes // len(block)
        info = await store.put("demo", pieces(*[block] * count, b"end"))
        digest, size = hashlib.sha256(), 0
        async for piece in store.get("demo"):
            digest.update(piece)
            size += len(piece)
        assert (size, digest.hexdigest()) == (info.bytes, info.sha256)
        assert size == count * len(block) + 3

    async def test_keys_do_not_meet(self, store: SnapshotStore) -> None:
        for key in KEYS:
            await put(store, key, key.encode())
        for key in KEYS:
            assert await get(store, key) == key.encode()
        assert [info.key for info in await listed(store)] == sorted(KEYS)

    async def test_nothing_is_there_at_first(self, store: SnapshotStore) -> None:
        assert await listed(store) == []
        assert await listed(store, "demo") == []
        with pytest.raises(NotFoundError, match="demo"):
            await store.find("demo")

    async def test_what_is_missing_is_told_before_the_first_piece(self, store: SnapshotStore) -> None:
        await put(store, "other", b"x")
        with pytest.raises(NotFoundError, match="demo"):
            await anext(store.get("demo"))
        for version in ("20200101T000000000000Z-00000000", "", "../other", "*"):
            with pytest.raises(NotFoundError):
                await anext(store.get("other", version))
            with pytest.raises(NotFoundError):
                await store.delete("other", version)
        assert await get(store, "other") == b"x"

    async def test_nothing_is_seen_of_one_that_is_being_written(
        self, store: SnapshotStore, harness: StoreHarness
    ) -> None:
        await put(store, "demo", b"first")
        gate = asyncio.Event()
        writing = asyncio.create_task(store.put("demo", held(gate, noise(2 << 20), b"end")))
        try:
            for _ in range(5):
                await asyncio.sleep(0.02)
                async with harness.started(instance=SECOND) as other:
                    assert len(await listed(other)) == 1
                    assert await get(other, "demo") == b"first"
            gate.set()
            info = await asyncio.wait_for(writing, DEADLINE_SECONDS)
        finally:
            gate.set()
            await asyncio.wait({writing})
        assert info.bytes == (2 << 20) + 3, "a start elsewhere does not take what is being written for a leftover"
        assert await get(store, "demo") == noise(2 << 20) + b"end"

    async def test_others_see_it_and_so_does_the_next_start(self, store: SnapshotStore, harness: StoreHarness) -> None:
        info = await put(store, "demo", b"kept")
        async with harness.started() as other:
            assert await listed(other) == [info]
            assert await get(other, "demo") == b"kept"

    async def test_a_reader_may_leave_early(self, store: SnapshotStore) -> None:
        await put(store, "demo", noise(3 << 20))
        reading = store.get("demo")
        assert await anext(reading)
        await reading.aclose()  # type: ignore[attr-defined]
        assert len(await get(store, "demo")) == 3 << 20

    async def test_the_file_on_this_host_is_the_archive(self, store: SnapshotStore) -> None:
        info = await put(store, "demo", b"content")
        path = await store.local_file(info)
        if path is not None:
            assert path.read_bytes() == b"content"
