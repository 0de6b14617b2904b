# ruff: noqa: S101 -- a test suite
"""Conformance of versions: their order, how many stay, and writers at the same time."""

from __future__ import annotations

import asyncio

import pytest

from hiverd.contracts.errors import NotFoundError
from hiverd.contracts.snapshot import SnapshotStore

from .snapshot_harness import KEEP, SECOND, StoreHarness, get, held, listed, noise, pieces, put, versions

WRITERS = 6


class SnapshotVersionSuite:
    """Uses the fixtures `harness` and `store`."""

    async def test_the_newest_comes_first_and_the_oldest_go(self, store: SnapshotStore, harness: StoreHarness) -> None:
        infos = [await put(store, "demo", b"%d" % number) for number in range(KEEP + 2)]
        assert sorted(info.version for info in infos) == [info.version for info in infos]
        kept = infos[-1:] if harness.keeps_one else infos[-KEEP:]
        assert await listed(store, "demo") == kept[::-1]
        assert await get(store, "demo") == b"%d" % (KEEP + 1)
        for info in kept:
            assert await get(store, "demo", info.version) == b"%d" % infos.index(info)
        with pytest.raises(NotFoundError):
            await get(store, "demo", infos[0].version)
        assert await harness.leftovers() == []

    async def test_one_may_be_all(self, harness: StoreHarness) -> None:
        async with harness.started(keep=1) as store:
            await put(store, "demo", b"old")
            info = await put(store, "demo", b"new")
            assert await listed(store) == [info]
            assert await get(store, "demo") == b"new"

    async def test_one_version_is_deleted(self, store: SnapshotStore, harness: StoreHarness) -> None:
        infos = [await put(store, "demo", b"%d" % number) for number in range(1 if harness.keeps_one else 3)]
        await store.delete("demo", infos[-1].version)
        assert await listed(store, "demo") == infos[-2::-1]
        if not harness.keeps_one:
            assert await get(store, "demo") == b"1", "the one before is the newest now"
        with pytest.raises(NotFoundError):
            await store.delete("demo", infos[-1].version)
        assert await harness.leftovers() == []

    async def test_a_key_is_deleted(self, store: SnapshotStore, harness: StoreHarness) -> None:
        for number in range(3):
            await put(store, "demo", b"%d" % number)
        kept = await put(store, "demo-2", b"kept")
        await store.delete("demo")
        assert await listed(store) == [kept]
        with pytest.raises(NotFoundError):
            await anext(store.get("demo"))
        with pytest.raises(NotFoundError, match="demo"):
            await store.delete("demo")
        assert await harness.leftovers() == []
        again = await put(store, "demo", b"again")
        assert await listed(store) == [again, kept]

    async def test_the_last_to_be_complete_wins(self, store: SnapshotStore) -> None:
        gate = asyncio.Event()
        slow = asyncio.create_task(store.put("demo", held(gate, noise(2 << 20, 1), b"slow")))
        await asyncio.sleep(0.05)
        quick = await put(store, "demo", noise(2 << 20, 2) + b"quick")
        assert await store.find("demo") == quick
        gate.set()
        info = await slow
        assert info.version > quick.version
        assert await store.find("demo") == info
        assert (await get(store, "demo"))[-4:] == b"slow"

    async def test_many_writers_never_make_a_mixture(self, store: SnapshotStore, harness: StoreHarness) -> None:
        contents = [bytes([number]) * 4096 + noise(1 << 20, number) for number in range(WRITERS)]
        async with harness.started(instance=SECOND) as second:
            puts = [
                (store, second)[number % 2].put(
                    "demo", pieces(*[data[at : at + 100_000] for at in range(0, len(data), 100_000)])
                )
                for number, data in enumerate(contents)
            ]
            done = asyncio.gather(*puts)
            while not done.done():
                await asyncio.sleep(0)
                try:
                    assert await get(second, "demo") in contents
                except NotFoundError:
                    continue  # none is complete yet, or it was the oldest and went meanwhile
            infos = await done
        assert len({info.version for info in infos}) == WRITERS
        left = await listed(store, "demo")
        assert 1 <= len(left) <= (1 if harness.keeps_one else WRITERS)
        for info in left:
            assert await get(store, "demo", info.version) == contents[infos.index(info)]
        if not harness.keeps_one:
            assert left[0].version == max(info.version for info in infos)
        await put(store, "demo", b"last")
        assert len(await versions(store, "demo")) <= KEEP
        assert await get(store, "demo") == b"last"
        assert await harness.leftovers() == []

    async def test_a_key_is_deleted_while_it_is_written(self, store: SnapshotStore, harness: StoreHarness) -> None:
        async def remove() -> None:
            for _ in range(10):
                try:
                    await store.delete("demo")
                except NotFoundError:
                    await asyncio.sleep(0)

        for number in range(5):
            await asyncio.gather(put(store, "demo", b"%d" % number), remove())
        info = await put(store, "demo", b"last")
        assert await store.find("demo") == info
        assert await get(store, "demo") == b"last"
        assert await harness.leftovers() == []
