# ruff: noqa: S101 -- a test suite
"""Conformance of versions: what changes them, and writes that depend on one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from hiverd.contracts.filesystem import ABSENT, FileSystem, Info, VersionConflictError

from .filesystem_harness import DEADLINE_SECONDS, Harness, exists, get, put

RACES = 5
RACES_UNTIL_BOTH_WIN = 100


class VersionSuite:
    """Uses the fixtures `harness` and `files`."""

    async def test_a_version_changes_with_the_content(self, files: FileSystem, harness: Harness) -> None:
        if harness.deviates("no-versions"):
            assert (await put(files, "/file", b"one")).version is None
            return
        versions = []
        for body in (b"one", b"two", b"three", b"", b"one!"):
            versions.append((await put(files, "/file", body)).version)
            assert (await files.stat("/file")).version == versions[-1]
        assert all(versions)
        assert len(set(versions)) == len(versions)

    async def test_a_version_stays_while_nothing_changes(self, files: FileSystem) -> None:
        written = await put(files, "/file", b"one")
        await put(files, "/other", b"x")
        assert await get(files, "/file") == b"one"
        assert (await files.stat("/file")).version == written.version

    async def test_absent_is_expected(self, files: FileSystem) -> None:
        await put(files, "/d/file", b"one", ABSENT)
        with pytest.raises(VersionConflictError):
            await put(files, "/d/file", b"two", ABSENT)
        assert await get(files, "/d/file") == b"one"
        await files.delete("/d/file")
        await put(files, "/d/file", b"three", ABSENT)
        assert await get(files, "/d/file") == b"three"

    async def test_a_version_is_expected(self, files: FileSystem, harness: Harness) -> None:
        if harness.deviates("no-versions"):
            pytest.skip("the service has no versions")
        first = await put(files, "/file", b"one")
        second = await put(files, "/file", b"two", first.version)
        assert await get(files, "/file") == b"two"
        with pytest.raises(VersionConflictError):
            await put(files, "/file", b"three", first.version)
        assert (await files.stat("/file")).version == second.version
        assert await get(files, "/file") == b"two"

    async def test_a_version_of_what_has_gone(self, files: FileSystem, harness: Harness) -> None:
        if harness.deviates("no-versions"):
            pytest.skip("the service has no versions")
        first = await put(files, "/file", b"one")
        await files.delete("/file")
        with pytest.raises(VersionConflictError):
            await put(files, "/file", b"two", first.version)
        assert not await exists(files, "/file")

    async def test_conditions_hold_for_big_files(self, files: FileSystem, harness: Harness) -> None:
        big = bytes(harness.big_bytes)
        await put(files, "/file", b"one")
        with pytest.raises(VersionConflictError):
            await put(files, "/file", big, ABSENT)
        if not harness.deviates("no-versions"):
            old = await files.stat("/file")
            await put(files, "/file", b"two")
            with pytest.raises(VersionConflictError):
                await put(files, "/file", big, old.version)
            assert await get(files, "/file") == b"two"
        assert (await put(files, "/new", big, ABSENT)).size == len(big)

    async def test_of_two_that_expect_nothing_one_wins(self, files: FileSystem, harness: Harness) -> None:
        await self._race(files, harness, None)

    async def test_of_two_that_expect_a_version_one_wins(self, files: FileSystem, harness: Harness) -> None:
        if harness.deviates("no-versions"):
            pytest.skip("the service has no versions")
        await self._race(files, harness, b"the first")

    async def _race(self, files: FileSystem, harness: Harness, body: bytes | None) -> None:
        racy = harness.deviates("racy-versions")
        for number in range(RACES_UNTIL_BOTH_WIN if racy else RACES):
            path = f"/race{number}"
            version = ABSENT if body is None else (await put(files, path, body)).version
            bodies = (b"ours" * 1000, b"theirs" * 1000)
            outcomes = await write_at_once(files, path, bodies, version)
            winners = [index for index, outcome in enumerate(outcomes) if isinstance(outcome, Info)]
            if racy and len(winners) == len(bodies):
                return
            assert len(winners) == 1, outcomes
            assert isinstance(outcomes[1 - winners[0]], VersionConflictError), outcomes
            assert await get(files, path) == bodies[winners[0]]
        assert not racy, "one writer won each time: the deviation racy-versions is not true"


async def write_at_once(
    files: FileSystem, path: str, bodies: tuple[bytes, bytes], version: str | None
) -> list[Info | BaseException]:
    """Two writes; neither content ends before both have been asked for."""
    started = 0
    both = asyncio.Event()

    async def content(body: bytes) -> AsyncIterator[bytes]:
        nonlocal started
        started += 1
        if started == len(bodies):
            both.set()
        yield body[:10]
        # One that is refused beforehand never asks for its content.
        await asyncio.wait([asyncio.ensure_future(both.wait())], timeout=1)
        yield body[10:]

    async with asyncio.timeout(DEADLINE_SECONDS):
        return await asyncio.gather(
            *(files.write(path, content(body), size=len(body), expected_version=version) for body in bodies),
            return_exceptions=True,
        )
