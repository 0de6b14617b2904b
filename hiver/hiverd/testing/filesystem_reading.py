# ruff: noqa: S101 -- a test suite
"""Conformance of looking and reading."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pytest

from hiverd.contracts.filesystem import FileSystem

from .filesystem_harness import Harness, each, get, pieces, put, refused

TEN = b"0123456789"


class ReadingSuite:
    """Uses the fixtures `harness` and `files`."""

    async def test_the_root_always_exists(self, files: FileSystem) -> None:
        root = await files.stat("/")
        assert (root.path, root.is_dir, root.size, root.link_target, root.version) == ("/", True, 0, None, None)
        assert root.mtime.tzinfo is not None

    async def test_missing(self, files: FileSystem) -> None:
        await put(files, "/there", b"x")
        for path in ("/missing", "/missing/below", "/ther", "/there2"):
            with pytest.raises(FileNotFoundError):
                await files.stat(path)
        with pytest.raises((FileNotFoundError, NotADirectoryError)):
            await files.stat("/there/below")

    async def test_stat_of_a_file(self, files: FileSystem, harness: Harness) -> None:
        await put(files, "/a/file", TEN)
        info = await files.stat("/a/file")
        assert (info.path, info.size, info.is_dir, info.link_target) == ("/a/file", 10, False, None)
        assert info.version is None if harness.deviates("no-versions") else info.version

    async def test_times_are_about_now(self, files: FileSystem) -> None:
        written = await put(files, "/file", TEN)
        info = await files.stat("/file")
        for mtime in (written.mtime, info.mtime):
            assert mtime.tzinfo is not None
            assert abs(datetime.now(UTC) - mtime) < timedelta(minutes=10)

    async def test_stat_of_a_directory(self, files: FileSystem) -> None:
        await put(files, "/a/b/file", TEN)
        for path in ("/a", "/a/b"):
            info = await files.stat(path)
            assert (info.path, info.is_dir, info.size, info.link_target) == (path, True, 0, None)
            assert info.version is None
            assert info.mtime.tzinfo is not None

    @pytest.mark.parametrize(
        ("offset", "size", "expected"),
        [
            (0, None, TEN),
            (0, 10, TEN),
            (0, 1, b"0"),
            (3, 4, b"3456"),
            (9, 1, b"9"),
            (4, None, TEN[4:]),
            (4, 1000, TEN[4:]),
            (10, None, b""),
            (10, 5, b""),
            (11, None, b""),
            (1 << 40, 5, b""),
            (2, 0, b""),
        ],
    )
    async def test_ranges(self, files: FileSystem, offset: int, size: int | None, expected: bytes) -> None:
        await put(files, "/file", TEN)
        assert await get(files, "/file", offset, size) == expected

    @pytest.mark.parametrize(("offset", "size"), [(0, None), (0, 10), (5, None), (5, 1)])
    async def test_ranges_of_an_empty_file(self, files: FileSystem, offset: int, size: int | None) -> None:
        await put(files, "/empty")
        assert (await files.stat("/empty")).size == 0
        assert await get(files, "/empty", offset, size) == b""

    async def test_reading_what_is_no_file(self, files: FileSystem) -> None:
        await put(files, "/a/file", TEN)
        with pytest.raises(FileNotFoundError):
            await get(files, "/missing")
        with pytest.raises(FileNotFoundError):
            await get(files, "/missing", 5, 5)
        with refused():
            await get(files, "/a")

    async def test_a_big_file_comes_in_pieces(self, files: FileSystem, harness: Harness) -> None:
        data = random.Random(7).randbytes(5 << 20)  # noqa: S311 -- not a secret
        await files.write("/big", pieces(data[: 3 << 20], data[3 << 20 :]), size=len(data), expected_version=None)
        sizes, received = [], bytearray()
        async for piece in files.read("/big", 0, None):
            sizes.append(len(piece))
            received += piece
        assert received == data
        assert max(sizes) <= 2 << 20
        assert min(sizes) > 0
        assert await get(files, "/big", (3 << 20) - 5, 10) == data[(3 << 20) - 5 :][:10]
        assert await get(files, "/big", len(data) - 3, None) == data[-3:]

    async def test_an_abandoned_read_harms_nothing(self, files: FileSystem) -> None:
        data = bytes(4 << 20)
        await put(files, "/big", data)
        for _ in range(5):
            reading = files.read("/big", 0, None)
            async for piece in reading:
                assert piece
                break
            await reading.aclose()  # type: ignore[attr-defined]  # reads are generators
        assert await get(files, "/big", 10, 10) == bytes(10)

    async def test_calls_overlap(self, files: FileSystem) -> None:
        bodies = {f"/d{number % 5}/f{number}": b"%d" % number * number for number in range(60)}
        await each(put(files, path, body) for path, body in bodies.items())
        assert await each(get(files, path) for path in bodies) == list(bodies.values())
        assert [info.size for info in await each(files.stat(path) for path in bodies)] == list(
            map(len, bodies.values())
        )
