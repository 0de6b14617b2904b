# ruff: noqa: S101 -- a test suite
"""Conformance of writing files and making directories."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator

import pytest

from hiverd.contracts.filesystem import FileSystem

from .filesystem_harness import (
    DEADLINE_SECONDS,
    BrokenSourceError,
    Harness,
    broken,
    entries,
    exists,
    get,
    pieces,
    put,
    refused,
    tree,
)


async def blocks(count: int, size: int) -> AsyncIterator[bytes]:
    """Different blocks, made while they are asked for."""
    for number in range(count):
        yield (b"%08d" % number) * (size // 8)


class WritingSuite:
    """Uses the fixtures `harness` and `files`."""

    async def test_parents_are_made(self, files: FileSystem) -> None:
        written = await put(files, "/a/b/c/file", b"hello")
        assert (written.path, written.size, written.is_dir, written.link_target) == ("/a/b/c/file", 5, False, None)
        assert (await files.stat("/a/b")).is_dir
        assert await get(files, "/a/b/c/file") == b"hello"

    async def test_the_answer_is_what_is_there(self, files: FileSystem) -> None:
        written = await put(files, "/file", b"hello")
        looked = await files.stat("/file")
        assert (looked.size, looked.version) == (written.size, written.version)
        assert abs((looked.mtime - written.mtime).total_seconds()) < 2

    async def test_a_file_is_replaced_as_a_whole(self, files: FileSystem) -> None:
        for body in (b"a long first content", b"short", b"", b"x" * 100_000):
            written = await put(files, "/file", body)
            assert written.size == len(body)
            assert await get(files, "/file") == body
            assert (await files.stat("/file")).size == len(body)
        assert set(await entries(files, "/")) == {"/file"}

    async def test_pieces_of_all_sizes(self, files: FileSystem) -> None:
        content = [b"", b"a", b"", b"bc" * 40_000, b"d", b""]
        whole = b"".join(content)
        await files.write("/file", pieces(*content), size=len(whole), expected_version=None)
        assert await get(files, "/file") == whole

    async def test_a_broken_source_changes_nothing(self, files: FileSystem) -> None:
        await put(files, "/old", b"old")
        before = await files.stat("/old")
        for path in ("/old", "/new"):
            with pytest.raises(BrokenSourceError):
                await files.write(path, broken(b"n", b"ew"), size=3, expected_version=None)
        after = await files.stat("/old")
        assert (after.size, after.version) == (before.size, before.version)
        assert await tree(files) == {"/old": b"old"}

    async def test_a_broken_source_of_a_big_file_changes_nothing(self, files: FileSystem, harness: Harness) -> None:
        await put(files, "/old", b"old")
        block = bytes(1 << 20)
        count = harness.big_bytes // len(block)
        for path in ("/old", "/new"):
            source = broken(*[block] * (count - 1))
            with pytest.raises(BrokenSourceError):
                await files.write(path, source, size=harness.big_bytes, expected_version=None)
        assert await tree(files) == {"/old": b"old"}

    @pytest.mark.parametrize("difference", [-1, 1])
    async def test_a_source_of_another_size_changes_nothing(self, files: FileSystem, difference: int) -> None:
        await put(files, "/file", b"old")
        with refused():
            await files.write("/file", pieces(b"12345"), size=5 + difference, expected_version=None)
        assert await get(files, "/file") == b"old"

    async def test_a_cancelled_write_changes_nothing(self, files: FileSystem) -> None:
        await put(files, "/file", b"old")
        asked = asyncio.Event()

        async def stuck() -> AsyncIterator[bytes]:
            yield b"new"
            asked.set()
            await asyncio.Event().wait()

        writing = asyncio.create_task(
            files.write("/file", stuck(), size=100, expected_version=None), name="cancelled write"
        )
        await asyncio.wait_for(asked.wait(), DEADLINE_SECONDS)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert await tree(files) == {"/file": b"old"}

    async def test_a_big_file(self, files: FileSystem, harness: Harness) -> None:
        block = 1 << 18
        count = harness.big_bytes // block
        written = await files.write("/big", blocks(count, block), size=count * block, expected_version=None)
        assert written.size == count * block
        digest = hashlib.sha256()
        async for piece in files.read("/big", 0, None):
            digest.update(piece)
        expected = hashlib.sha256()
        async for piece in blocks(count, block):
            expected.update(piece)
        assert digest.digest() == expected.digest()
        looked = await files.stat("/big")
        assert (looked.size, looked.version) == (count * block, written.version)

    async def test_a_directory_that_is_made(self, files: FileSystem, harness: Harness) -> None:
        await files.make_directory("/a/b")
        if harness.deviates("no-empty-directories"):
            assert not await exists(files, "/a/b")
            assert await entries(files, "/") == {}
            return
        assert (await files.stat("/a/b")).is_dir
        assert (await files.stat("/a")).is_dir
        assert {path: info.is_dir for path, info in (await entries(files, "/a")).items()} == {"/a/b": True}
        assert await entries(files, "/a/b") == {}

    async def test_making_a_directory_again(self, files: FileSystem) -> None:
        await put(files, "/a/file", b"x")
        for path in ("/a", "/", "/a/b", "/a/b", "/a/b"):
            await files.make_directory(path)
        assert await get(files, "/a/file") == b"x"
        assert "/a/file" in await entries(files, "/a")

    async def test_a_directory_stays_when_what_was_in_it_goes(self, files: FileSystem, harness: Harness) -> None:
        await files.make_directory("/made")
        await put(files, "/made/file")
        await put(files, "/implied/file")
        await files.delete("/made/file")
        await files.delete("/implied/file")
        assert await exists(files, "/made") is not harness.deviates("no-empty-directories")
        kept = not (harness.deviates("implied-directories") or harness.deviates("no-empty-directories"))
        assert await exists(files, "/implied") is kept
