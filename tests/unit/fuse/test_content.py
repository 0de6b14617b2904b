"""When the content behind a folder is asked, and that nothing is done if it refuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hiverd.fuse import abi
from hiverd.fuse.attributes import SHARED
from unit.fuse.conftest import Kernel, MakeKernel


class Recorder:
    """Notes each call; fails those named in `failing`."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.failing: set[str] = set()

    def _note(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] in self.failing:
            raise TimeoutError(110, "Connection timed out")

    def look_up(self, path: str) -> None:
        self._note("look_up", path)

    def list(self, path: str) -> None:
        self._note("list", path)

    def open(self, path: str, *, write: bool, truncate: bool) -> bool:
        self._note("open", path, write, truncate)
        return False

    def read(self, path: str, offset: int, size: int) -> None:
        self._note("read", path, offset, size)

    def modify(self, path: str) -> None:
        self._note("modify", path)

    def close(self, path: str, *, written: bool) -> None:
        self._note("close", path, written)

    def created(self, path: str) -> None:
        self._note("created", path)

    def make_directory(self, path: str) -> None:
        self._note("make_directory", path)

    def symlink(self, path: str, target: str) -> None:
        self._note("symlink", path, target)

    def unlink(self, path: str) -> None:
        self._note("unlink", path)

    def remove_directory(self, path: str) -> None:
        self._note("remove_directory", path)

    def rename(self, source: str, target: str) -> None:
        self._note("rename", source, target)

    def taken(self) -> list[tuple[Any, ...]]:
        calls, self.calls = self.calls, []
        return calls


@pytest.fixture
def content() -> Recorder:
    return Recorder()


@pytest.fixture
def remote(kernel: MakeKernel, content: Recorder) -> Kernel:
    return kernel([("/**", "rw"), ("/no/**", "deny")], content=content, caching=SHARED)


def test_the_life_of_a_file(remote: Kernel, content: Recorder) -> None:
    assert remote.error(abi.LOOKUP, body=b"f\0") == "ENOENT"
    node, handle = remote.create(abi.ROOT_ID, "f")
    remote.write(handle, b"hello")
    remote.release(handle)
    assert content.taken() == [("look_up", "/f"), ("created", "/f"), ("modify", "/f"), ("close", "/f", True)]
    handle = remote.open(node)
    assert remote.read(handle, 100, 1) == b"ello"
    remote.release(handle)
    assert content.taken() == [("open", "/f", False, False), ("read", "/f", 1, 100), ("close", "/f", False)]
    handle = remote.open(node, os.O_WRONLY | os.O_TRUNC)
    remote.release(handle)
    assert content.taken() == [("open", "/f", True, True), ("modify", "/f"), ("close", "/f", True)]
    body = abi.SETATTR_IN.pack(abi.FATTR_SIZE, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    remote.ask(abi.SETATTR, node, body)
    assert content.taken() == [("open", "/f", True, False), ("modify", "/f"), ("close", "/f", True)]
    remote.rename(abi.ROOT_ID, "f", abi.ROOT_ID, "g")
    remote.ask(abi.UNLINK, body=b"g\0")
    assert content.taken() == [("look_up", "/g"), ("rename", "/f", "/g"), ("unlink", "/g")]


def test_directories_and_links(remote: Kernel, content: Recorder) -> None:
    remote.ask(abi.MKDIR, body=abi.MKDIR_IN.pack(0o755, 0) + b"d\0")
    directory = remote.walk("d")
    remote.ask(abi.SYMLINK, directory, b"l\0../target\0")
    content.taken()
    remote.ask(abi.OPENDIR, directory, abi.OPEN_IN.pack(0, 0))
    remote.ask(abi.UNLINK, directory, b"l\0")
    remote.ask(abi.RMDIR, body=b"d\0")
    assert content.taken() == [("list", "/d"), ("unlink", "/d/l"), ("list", "/d"), ("remove_directory", "/d")]


def test_what_is_open_when_it_goes_is_here_before(remote: Kernel, content: Recorder) -> None:
    _node, handle = remote.create(abi.ROOT_ID, "f")
    remote.write(handle, b"hello")
    content.taken()
    remote.ask(abi.UNLINK, body=b"f\0")
    assert remote.read(handle) == b"hello"
    remote.release(handle)
    assert content.taken() == [("read", "/f", 0, 5), ("unlink", "/f")]


@pytest.mark.parametrize("call", ["look_up", "created", "make_directory", "symlink", "unlink", "rename"])
def test_a_refusal_is_the_answer(remote: Kernel, content: Recorder, call: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "old").write_text("x")
    content.failing = {call}
    requests = {
        "look_up": (abi.LOOKUP, b"old\0"),
        "created": (abi.CREATE, abi.CREATE_IN.pack(os.O_RDWR | os.O_CREAT, 0o100644, 0, 0) + b"new\0"),
        "make_directory": (abi.MKDIR, abi.MKDIR_IN.pack(0o755, 0) + b"new\0"),
        "symlink": (abi.SYMLINK, b"new\0target\0"),
        "unlink": (abi.UNLINK, b"old\0"),
        "rename": (abi.RENAME2, abi.RENAME2_IN.pack(1, 0, 0) + b"old\0new\0"),
    }
    operation, body = requests[call]
    assert remote.error(operation, body=body) == "ETIMEDOUT"
    assert (folder / "old").exists()


def test_what_is_denied_is_not_asked_for(remote: Kernel, content: Recorder) -> None:
    assert remote.error(abi.LOOKUP, body=b"no\0") == "ENOENT"
    assert remote.error(abi.MKDIR, body=abi.MKDIR_IN.pack(0o755, 0) + b"no\0") == "EROFS"
    assert content.taken() == []
