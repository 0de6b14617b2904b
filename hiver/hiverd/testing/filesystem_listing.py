# ruff: noqa: S101 -- a test suite
"""Conformance of listing."""

from __future__ import annotations

import pytest

from hiverd.contracts.filesystem import FileSystem

from .filesystem_harness import Harness, each, entries, get, put, refused

ODD_NAMES = [
    "two words",
    " leading and trailing ",
    "naïve-ünïcode-文件-🗂",
    "e\u0301 combining",
    "100%",
    "%2F%41",
    "a+b",
    "#hash#",
    "what?x=1&y=2",
    ".hidden",
    "..two",
    "...",
    "~tilde",
    "quote'\"`",
    "semi;colon:comma,",
    "back\\slash",
    "<angle>&amp;",
    "[bracket]{brace}",
    "star*",
    "$dollar@at!",
    "a=b|c^d",
    "-dash",
    "x" * 200,
]


class ListingSuite:
    """Uses the fixtures `harness` and `files`."""

    async def test_an_empty_root(self, files: FileSystem) -> None:
        assert await entries(files, "/") == {}

    async def test_one_level(self, files: FileSystem) -> None:
        for path in ("/a/b/c/deep", "/a/b/file", "/a/file", "/top", "/ab", "/a.b", "/a-b"):
            await put(files, path, b"xyz")
        listed = {path: (info.is_dir, info.size) for path, info in (await entries(files, "/")).items()}
        assert listed == {
            "/a": (True, 0),
            "/top": (False, 3),
            "/ab": (False, 3),
            "/a.b": (False, 3),
            "/a-b": (False, 3),
        }
        assert set(await entries(files, "/a")) == {"/a/b", "/a/file"}
        assert set(await entries(files, "/a/b")) == {"/a/b/c", "/a/b/file"}

    async def test_a_listing_says_what_stat_says(self, files: FileSystem) -> None:
        await put(files, "/d/file", b"hello")
        await put(files, "/d/empty")
        await put(files, "/d/sub/x")
        for path, info in (await entries(files, "/d")).items():
            looked = await files.stat(path)
            assert (info.size, info.is_dir, info.version) == (looked.size, looked.is_dir, looked.version)
            assert info.is_dir or abs((info.mtime - looked.mtime).total_seconds()) < 2
            assert info.mtime.tzinfo is not None

    @pytest.mark.parametrize("name", ODD_NAMES)
    async def test_odd_names(self, files: FileSystem, name: str) -> None:
        """As a file, as a directory, and as a part of a file's path."""
        body = name.encode()
        written = await put(files, f"/{name}", body)
        assert written.path == f"/{name}"
        await put(files, f"/dir {name}/{name}", body)
        assert await get(files, f"/{name}") == body
        assert await get(files, f"/dir {name}/{name}", 1, 3) == body[1:4]
        assert (await files.stat(f"/{name}")).path == f"/{name}"
        assert set(await entries(files, "/")) == {f"/{name}", f"/dir {name}"}
        assert set(await entries(files, f"/dir {name}")) == {f"/dir {name}/{name}"}
        await files.move(f"/{name}", f"/dir {name}/moved {name}")
        assert await get(files, f"/dir {name}/moved {name}") == body
        await files.delete(f"/dir {name}/{name}")
        assert set(await entries(files, f"/dir {name}")) == {f"/dir {name}/moved {name}"}

    async def test_names_with_a_line_feed(self, files: FileSystem, harness: Harness) -> None:
        name = "/two\nlines"
        if harness.deviates("no-newlines"):
            with refused():
                await put(files, name, b"x")
            assert await entries(files, "/") == {}
            return
        await put(files, name, b"x")
        assert set(await entries(files, "/")) == {name}
        assert await get(files, name) == b"x"

    async def test_case(self, files: FileSystem) -> None:
        await put(files, "/Name", b"upper")
        await put(files, "/name", b"lower")
        expected = {"/Name", "/name"} if files.case_sensitive else {next(iter(await entries(files, "/")))}
        assert set(await entries(files, "/")) == expected
        assert await get(files, "/Name") == (b"upper" if files.case_sensitive else b"lower")

    async def test_many_pages(self, files: FileSystem, harness: Harness) -> None:
        paths = {f"/many/f{number:05}" for number in range(harness.many)}
        await each(put(files, path, b"x") for path in paths)
        await put(files, "/many/zz/below")
        listed = await entries(files, "/many")
        assert set(listed) == paths | {"/many/zz"}
        assert sum(info.is_dir for info in listed.values()) == 1

    async def test_a_listing_can_be_given_up(self, files: FileSystem) -> None:
        await each(put(files, f"/d/{number}") for number in range(20))
        listing = files.list_directory("/d")
        async for info in listing:
            assert info.path.startswith("/d/")
            break
        await listing.aclose()  # type: ignore[attr-defined]  # listings are generators
        assert len(await entries(files, "/d")) == 20

    async def test_no_recursion(self, files: FileSystem, harness: Harness) -> None:
        """What is below costs nothing: neither objects nor requests."""
        await each(put(files, f"/a/{number % 7}/{number}") for number in range(140))
        before = harness.faults.requests if harness.faults else 0
        assert set(await entries(files, "/")) == {"/a"}
        assert set(await entries(files, "/a")) == {f"/a/{number}" for number in range(7)}
        after = harness.faults.requests if harness.faults else 0
        assert after - before <= 8

    async def test_what_is_no_directory(self, files: FileSystem, harness: Harness) -> None:
        await put(files, "/file", b"x")
        if harness.deviates("missing-is-empty"):
            assert await entries(files, "/missing") == {}
        else:
            with pytest.raises(FileNotFoundError):
                await entries(files, "/missing")
            with pytest.raises((FileNotFoundError, NotADirectoryError)):
                await entries(files, "/file")
        with pytest.raises(FileNotFoundError):
            await files.stat("/missing")
