# ruff: noqa: S101 -- a test suite
"""Conformance when something goes wrong: sources that fail, writers that die, full disks, damage."""

from __future__ import annotations

import asyncio

import pytest

from hiverd.contracts.errors import HiverError, UnavailableError
from hiverd.contracts.snapshot import SnapshotDamagedError, SnapshotStore

from .snapshot_harness import BrokenSourceError, StoreHarness, broken, get, held, listed, noise, pieces, put


class SnapshotFaultSuite:
    """Uses the fixtures `harness` and `store`."""

    @pytest.mark.parametrize("size", [0, 10, 3 << 20])
    async def test_a_source_that_fails_changes_nothing(
        self, store: SnapshotStore, harness: StoreHarness, size: int
    ) -> None:
        info = await put(store, "demo", b"old")
        for key in ("demo", "new"):
            with pytest.raises(BrokenSourceError):
                await store.put(key, broken(noise(size)))
        assert await listed(store) == [info]
        assert await get(store, "demo") == b"old"
        assert await harness.leftovers() == []

    async def test_a_big_one_that_fails_late(self, store: SnapshotStore, harness: StoreHarness) -> None:
        block = noise(1 << 20)
        with pytest.raises(BrokenSourceError):
            await store.put("demo", broken(*[block] * (harness.big_bytes // len(block))))
        assert await listed(store) == []
        assert await harness.leftovers() == []

    async def test_a_writer_that_is_cancelled(self, store: SnapshotStore, harness: StoreHarness) -> None:
        info = await put(store, "demo", b"old")
        gate = asyncio.Event()
        for delay in (0.0, 0.01, 0.1):
            writing = asyncio.create_task(store.put("demo", held(gate, noise(2 << 20), b"end")))
            await asyncio.sleep(delay)
            writing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await writing
        assert await listed(store) == [info]
        assert await get(store, "demo") == b"old"
        assert await harness.leftovers() == []

    async def test_a_writer_that_was_killed(self, store: SnapshotStore, harness: StoreHarness) -> None:
        info = await put(store, "demo", b"old")
        await harness.abandon()
        assert await listed(store) == [info]
        async with harness.started() as after:
            assert await listed(after) == [info]
            assert await get(after, "demo") == b"old"
            await put(after, "demo", b"new")
            assert await get(after, "demo") == b"new"
        assert await harness.leftovers() == []

    async def test_damage_is_never_passed_off_as_whole(self, store: SnapshotStore, harness: StoreHarness) -> None:
        data = noise(3 << 20)
        info = await put(store, "demo", data)
        await harness.damage(info)
        seen = bytearray()

        async def read() -> None:
            async for piece in store.get("demo"):
                seen.extend(piece)

        with pytest.raises(SnapshotDamagedError, match="demo"):
            await read()
        assert bytes(seen) != data
        new = await put(store, "demo", b"whole again")
        assert await store.find("demo") == new
        assert await get(store, "demo") == b"whole again"

    async def test_no_space(self, harness: StoreHarness) -> None:
        if not harness.can_fill:
            pytest.skip("this place cannot be filled")
        async with harness.started() as store:
            info = await put(store, "demo", b"old")
            harness.fill()
            with pytest.raises(UnavailableError, match="full"):
                await store.put("demo", pieces(*[noise(1 << 20)] * 80))
            assert await listed(store) == [info]
            assert await get(store, "demo") == b"old"
            assert await harness.leftovers() == []
            small = await put(store, "demo", b"small")
            assert await store.find("demo") == small

    async def test_errors_are_the_contracts(self, store: SnapshotStore) -> None:
        with pytest.raises(HiverError):
            await get(store, "nothing")
