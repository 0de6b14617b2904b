# ruff: noqa: S101 -- a test suite
"""Conformance of symbolic links."""

from __future__ import annotations

import pytest

from hiverd.contracts.filesystem import ABSENT, FileSystem, VersionConflictError

from .filesystem_harness import Harness, entries, exists, get, put, refused, tree

TARGETS = [
    "file",
    "../up/and/over",
    "/absolute/path",
    "/",
    ".",
    "..",
    "two words",
    " blank at both ends ",
    "ünïcode-文件-🗂",
    "100%25+#?&=;",
    "quote'\"back\\slash",
    "<xml>&amp;",
    "a,b;c=d",
    "long/" * 200,
]


class LinkSuite:
    """Uses the fixtures `harness` and `files`."""

    @pytest.fixture(autouse=True)
    async def _only_with_links(self, harness: Harness, request: pytest.FixtureRequest) -> None:
        if harness.deviates("no-symlinks") and "link" in request.node.name and "refused" not in request.node.name:
            pytest.skip("the service has no links")

    async def test_links_are_refused_where_there_are_none(self, files: FileSystem, harness: Harness) -> None:
        if not harness.deviates("no-symlinks"):
            await files.symlink("/link", "target")
            return
        with refused():
            await files.symlink("/link", "target")
        assert not await exists(files, "/link")

    @pytest.mark.parametrize("target", TARGETS)
    async def test_link_targets(self, files: FileSystem, target: str) -> None:
        await files.symlink("/d/link", target)
        info = await files.stat("/d/link")
        assert (info.path, info.is_dir, info.link_target) == ("/d/link", False, target)
        listed = await entries(files, "/d")
        assert {path: (info.is_dir, info.link_target) for path, info in listed.items()} == {"/d/link": (False, target)}

    async def test_a_listed_link_is_as_stat_says(self, files: FileSystem, harness: Harness) -> None:
        await files.symlink("/d/link", "target")
        looked, listed = await files.stat("/d/link"), (await entries(files, "/d"))["/d/link"]
        assert (looked.size, looked.version, looked.link_target) == (listed.size, listed.version, listed.link_target)
        assert looked.size == 0
        assert looked.version is None if harness.deviates("no-versions") else looked.version

    async def test_a_link_is_replaced(self, files: FileSystem, harness: Harness) -> None:
        await files.symlink("/link", "one")
        first = await files.stat("/link")
        await files.symlink("/link", "two")
        second = await files.stat("/link")
        assert second.link_target == "two"
        assert harness.deviates("no-versions") or first.version != second.version
        assert set(await entries(files, "/")) == {"/link"}

    async def test_a_link_replaces_a_file(self, files: FileSystem) -> None:
        await put(files, "/name", b"content")
        await files.symlink("/name", "target")
        assert await tree(files) == {"/name": "target"}
        assert (await files.stat("/name")).link_target == "target"

    async def test_a_file_replaces_a_link(self, files: FileSystem) -> None:
        await files.symlink("/name", "target")
        await put(files, "/name", b"content")
        assert await tree(files) == {"/name": b"content"}
        info = await files.stat("/name")
        assert (info.link_target, info.size) == (None, 7)
        await files.delete("/name")
        assert await tree(files) == {}

    async def test_a_file_replaces_a_link_of_a_version(self, files: FileSystem, harness: Harness) -> None:
        if harness.deviates("no-versions"):
            pytest.skip("the service has no versions")
        await files.symlink("/name", "one")
        old = await files.stat("/name")
        await files.symlink("/name", "two")
        with pytest.raises(VersionConflictError):
            await put(files, "/name", b"content", old.version)
        assert await tree(files) == {"/name": "two"}
        await put(files, "/name", b"content", (await files.stat("/name")).version)
        assert await tree(files) == {"/name": b"content"}

    async def test_a_link_is_not_absent(self, files: FileSystem, harness: Harness) -> None:
        await files.symlink("/name", "target")
        if harness.deviates("links-beside"):
            await put(files, "/name", b"content", ABSENT)
            assert await tree(files) == {"/name": b"content"}
            return
        with pytest.raises(VersionConflictError):
            await put(files, "/name", b"content", ABSENT)
        assert await tree(files) == {"/name": "target"}

    async def test_a_link_is_not_followed(self, files: FileSystem) -> None:
        await put(files, "/d/file", b"content")
        await files.symlink("/link", "d")
        await files.symlink("/d/file-link", "file")
        with pytest.raises((FileNotFoundError, NotADirectoryError)):
            await files.stat("/link/file")
        assert (await files.stat("/d/file-link")).link_target == "file"

    async def test_a_link_is_deleted_itself(self, files: FileSystem) -> None:
        await put(files, "/file", b"content")
        await files.symlink("/link", "file")
        await files.delete("/link")
        assert await tree(files) == {"/file": b"content"}
        await files.delete("/link")

    async def test_a_link_is_moved_itself(self, files: FileSystem) -> None:
        await files.symlink("/link", "target one")
        await files.move("/link", "/d/moved")
        assert await tree(files) == {"/d": None, "/d/moved": "target one"}

    async def test_a_link_moved_onto_a_file_and_back(self, files: FileSystem) -> None:
        await files.symlink("/link", "target")
        await put(files, "/file", b"content")
        await files.move("/link", "/file")
        assert await tree(files) == {"/file": "target"}
        await put(files, "/other", b"other")
        await files.move("/other", "/file")
        assert await tree(files) == {"/file": b"other"}
        assert await get(files, "/file") == b"other"

    async def test_a_tree_with_a_link_is_moved(self, files: FileSystem) -> None:
        await put(files, "/a/file", b"content")
        await files.symlink("/a/link", "file")
        await files.move("/a", "/b")
        assert await tree(files) == {"/b": None, "/b/file": b"content", "/b/link": "file"}

    async def test_a_directory_with_a_link_is_not_empty(self, files: FileSystem) -> None:
        await files.make_directory("/d")
        await files.symlink("/d/link", "x")
        with refused():
            await files.delete("/d")
        assert await tree(files) == {"/d": None, "/d/link": "x"}
