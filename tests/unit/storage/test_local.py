from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hiver_storage.local import LocalFileSystem
from hiverd.contracts.errors import InvalidError
from hiverd.contracts.filesystem import VersionConflictError


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


async def content(files: LocalFileSystem, path: str, offset: int = 0, size: int | None = None) -> bytes:
    return b"".join([piece async for piece in files.read(path, offset, size)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    return tmp_path / "shared"


@pytest.fixture
def files(folder: Path) -> LocalFileSystem:
    return LocalFileSystem({"mount": "/workspace", "backend": "local", "origin": str(folder)})


async def test_write_read_list_move_delete(files: LocalFileSystem, folder: Path) -> None:
    written = await files.write("/a/b/file", pieces(b"hello ", b"world"), size=11, expected_version=None)
    assert (written.path, written.size, written.is_dir) == ("/a/b/file", 11, False)
    assert await content(files, "/a/b/file") == b"hello world"
    assert await content(files, "/a/b/file", 6, 3) == b"wor"
    assert [(info.path, info.is_dir) async for info in files.list_directory("/a")] == [("/a/b", True)]
    await files.move("/a/b/file", "/c/moved")
    assert (await files.stat("/c/moved")).version == written.version
    with pytest.raises(FileNotFoundError):
        await files.stat("/a/b/file")
    await files.delete("/c/moved")
    await files.delete("/c/moved")
    await files.delete("/c")
    assert os.listdir(folder) == ["a"]
    with pytest.raises(OSError, match="not empty"):
        await files.delete("/a")


async def test_versions(files: LocalFileSystem) -> None:
    first = await files.write("/f", pieces(b"1"), size=1, expected_version=None)
    second = await files.write("/f", pieces(b"22"), size=2, expected_version=first.version)
    assert first.version != second.version
    for path, version in (("/f", first.version), ("/new", first.version)):
        with pytest.raises(VersionConflictError):
            await files.write(path, pieces(b"333"), size=3, expected_version=version)
    assert await content(files, "/f") == b"22"


async def test_a_write_that_breaks_off_leaves_nothing(files: LocalFileSystem, folder: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"half"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await files.write("/f", broken(), size=9, expected_version=None)
    assert os.listdir(folder) == []


@pytest.mark.parametrize("target", ["../outside", "/", "{outside}"])
async def test_links_are_never_followed(files: LocalFileSystem, folder: Path, target: str) -> None:
    outside = folder.parent / "outside"
    (folder / "link").symlink_to(target.format(outside=outside))
    (folder / "secret").symlink_to(outside / "secret")
    with pytest.raises(NotADirectoryError):
        await content(files, "/link/secret")
    with pytest.raises(OSError, match="not a regular file"):
        await content(files, "/secret")
    with pytest.raises(NotADirectoryError):
        await files.write("/link/new", pieces(b"x"), size=1, expected_version=None)
    with pytest.raises(NotADirectoryError):
        await files.move("/secret", "/link/moved")
    with pytest.raises(NotADirectoryError):
        await files.delete("/link/secret")
    await files.write("/secret", pieces(b"mine"), size=4, expected_version=None)
    assert (outside / "secret").read_text() == "secret"
    assert os.listdir(outside) == ["secret"]
    assert (await files.stat("/link")).link_target == target.format(outside=outside)
    assert await content(files, "/../../secret") == b"mine"


async def test_special_files_are_not_opened(files: LocalFileSystem, folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    with pytest.raises(OSError, match="not a regular file"):
        await content(files, "/fifo")


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({}, "mount"),
        ({"mount": "workspace", "origin": "/x"}, "mount"),
        ({"mount": "/w"}, "origin"),
        ({"mount": "/w", "origin": ""}, "origin"),
        ({"mount": "/w", "origin": 3}, "origin"),
    ],
)
def test_malformed_configurations(config: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidError) as refused:
        LocalFileSystem(config)
    assert refused.value.field == field
