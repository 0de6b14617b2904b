# ruff: noqa: S101 -- a test suite
"""Conformance of removing and renaming, and of the bounds of a mount."""

from __future__ import annotations

import contextlib
import errno

import pytest

from hiverd.contracts.errors import InvalidError
from hiverd.contracts.filesystem import FileSystem

from .filesystem_harness import Harness, each, entries, exists, get, put, refused, tree


class ChangingSuite:
    """Uses the fixtures `harness` and `files`."""

    async def test_delete_a_file(self, files: FileSystem) -> None:
        await put(files, "/d/file", b"x")
        await put(files, "/d/file2", b"y")
        await files.delete("/d/file")
        assert not await exists(files, "/d/file")
        assert set(await entries(files, "/d")) == {"/d/file2"}

    async def test_delete_what_is_missing(self, files: FileSystem) -> None:
        await put(files, "/file", b"x")
        for path in ("/missing", "/missing/below", "/fil"):
            await files.delete(path)
        assert await tree(files) == {"/file": b"x"}

    async def test_delete_an_empty_directory(self, files: FileSystem) -> None:
        await files.make_directory("/a/b")
        await files.delete("/a/b")
        assert not await exists(files, "/a/b")

    async def test_delete_a_directory_that_is_not_empty(self, files: FileSystem) -> None:
        await files.make_directory("/a/b")
        await put(files, "/a/b/file", b"x")
        for path in ("/a/b", "/a"):
            with refused() as caught:
                await files.delete(path)
            assert caught[0].errno == errno.ENOTEMPTY
        assert await get(files, "/a/b/file") == b"x"

    async def test_the_root_is_not_deleted(self, files: FileSystem) -> None:
        await put(files, "/file", b"x")
        with refused():
            await files.delete("/")
        assert await tree(files) == {"/file": b"x"}

    async def test_move_a_file(self, files: FileSystem) -> None:
        await put(files, "/from", b"content")
        await files.move("/from", "/new/parents/to")
        assert await get(files, "/new/parents/to") == b"content"
        assert (await files.stat("/new/parents/to")).size == 7
        assert not await exists(files, "/from")

    async def test_move_onto_a_file(self, files: FileSystem) -> None:
        await put(files, "/from", b"new")
        old = await put(files, "/to", b"old content")
        await files.move("/from", "/to")
        assert await tree(files) == {"/to": b"new"}
        assert old.version is None or (await files.stat("/to")).version != old.version

    async def test_move_onto_itself(self, files: FileSystem) -> None:
        await put(files, "/file", b"content")
        await files.move("/file", "/file")
        assert await tree(files) == {"/file": b"content"}

    async def test_move_what_is_missing(self, files: FileSystem) -> None:
        await put(files, "/file", b"x")
        with pytest.raises(FileNotFoundError):
            await files.move("/missing", "/other")
        with pytest.raises(FileNotFoundError):
            await files.move("/missing", "/file")
        assert await tree(files) == {"/file": b"x"}

    async def test_move_a_directory(self, files: FileSystem) -> None:
        bodies = {f"{number % 6}/deeper/{number}": b"%d" % number for number in range(40)}
        await each(put(files, f"/from/{path}", body) for path, body in bodies.items())
        await put(files, "/from-sibling", b"stays")
        await put(files, "/from.d/x", b"stays too")
        await files.move("/from", "/new/to")
        found = {path: body for path, body in (await tree(files)).items() if body is not None}
        expected = {f"/new/to/{path}": body for path, body in bodies.items()}
        assert found == {**expected, "/from-sibling": b"stays", "/from.d/x": b"stays too"}
        assert not await exists(files, "/from")

    async def test_move_an_empty_directory(self, files: FileSystem, harness: Harness) -> None:
        if harness.deviates("no-empty-directories"):
            pytest.skip("the service has no empty directories")
        await files.make_directory("/from/inner")
        await files.move("/from", "/to")
        assert await tree(files) == {"/to": None, "/to/inner": None}

    async def test_move_a_directory_below_itself(self, files: FileSystem) -> None:
        await put(files, "/a/file", b"x")
        with refused():
            await files.move("/a", "/a/b")
        assert await tree(files) == {"/a": None, "/a/file": b"x"}

    async def test_move_a_directory_onto_one_that_is_not_empty(self, files: FileSystem) -> None:
        await put(files, "/from/file", b"from")
        await put(files, "/to/other", b"to")
        with refused() as caught:
            await files.move("/from", "/to")
        assert caught[0].errno in {errno.ENOTEMPTY, errno.EEXIST}
        assert await get(files, "/to/other") == b"to"
        assert await get(files, "/from/file") == b"from"

    async def test_another_instance_sees_the_same(self, files: FileSystem, harness: Harness) -> None:
        await put(files, "/d/file", b"x")
        async with harness.opened() as others:
            assert await tree(others) == {"/d": None, "/d/file": b"x"}
            await put(others, "/d/file", b"theirs")
        assert await get(files, "/d/file") == b"theirs"

    async def test_close(self, harness: Harness) -> None:
        """Of one that was never used, and of one that was."""
        unused = harness.build()
        await unused.open()
        await unused.close()
        async with harness.opened() as files:
            await put(files, "/file", b"x")

    async def test_a_prefix_is_kept_to(self, harness: Harness) -> None:
        if harness.deviates("no-prefix"):
            await self._without_prefix(harness)
            return
        async with harness.opened("team") as team, harness.opened("team-b") as sibling:
            await put(sibling, "/secret", b"theirs")
            assert await tree(team) == {}
            await put(team, "/file", b"ours")
            async with harness.opened("team/inner") as inner:
                await put(inner, "/file", b"inside")
            assert await tree(team) == {"/file": b"ours", "/inner": None, "/inner/file": b"inside"}
            assert await tree(sibling) == {"/secret": b"theirs"}
            assert not await exists(team, "/-b/secret")

    async def _without_prefix(self, harness: Harness) -> None:
        async with harness.opened("team") as one, harness.opened("other") as other:
            await put(one, "/file", b"x")
            assert await exists(other, "/file")

    @pytest.mark.parametrize(
        "path", ["/../team-b/secret", "/a/../../team-b/secret", "/..", "/./../team-b/secret", "/%2e%2e/team-b/secret"]
    )
    async def test_no_path_leads_out(self, harness: Harness, path: str) -> None:
        """A path that is not clean is refused, or taken as one below the mount."""
        if harness.deviates("no-prefix"):
            pytest.skip("there is no prefix")
        async with harness.opened("team") as team, harness.opened("team-b") as sibling, harness.opened() as whole:
            await put(team, "/file", b"ours")
            await put(sibling, "/secret", b"theirs")
            with contextlib.suppress(OSError, InvalidError):
                assert await get(team, path) != b"theirs"
            for change in (
                lambda: put(team, path, b"intruder"),
                lambda: team.move(path, "/stolen"),
                lambda: team.move("/file", path),
                lambda: team.symlink(path, "x"),
                lambda: team.delete(path),
            ):
                with contextlib.suppress(OSError, InvalidError):
                    await change()
            assert await tree(sibling) == {"/secret": b"theirs"}
            assert set(await entries(whole, "/")) <= {"/team", "/team-b"}
            assert b"theirs" not in (await tree(team)).values()
