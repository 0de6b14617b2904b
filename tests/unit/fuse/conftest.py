"""A mount without a kernel: requests as bytes, answers as bytes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from hiverd.files.acl import Access, Rules
from hiverd.fuse import abi
from hiverd.fuse.attributes import OWNED, Attributes, Caching, Owners
from hiverd.fuse.caller import Caller
from hiverd.fuse.core import Core
from hiverd.fuse.descriptors import Directories, inode_of
from hiverd.fuse.dispatch import Dispatcher
from hiverd.fuse.judge import FsAccess, Judge
from hiverd.fuse.nodes import Tree
from hiverd.remote.content import Content
from hiverd.wire.model import AclRule

SERVER = 4242
"""The thread that is not judged."""


class Kernel:
    """The other side of `/dev/fuse`, as far as a test needs it. Answers are payloads; errors are raised."""

    def __init__(
        self,
        folder: Path,
        rules: list[tuple[str, Access]],
        *,
        content: Content | None = None,
        caching: Caching = OWNED,
        bound: int = 64,
    ) -> None:
        self.events: list[FsAccess] = []
        self.caller = Caller()
        root_fd = os.open(folder, os.O_PATH | os.O_DIRECTORY)
        compiled = Rules([AclRule(path=path, access=access) for path, access in rules], "/the/mount")
        self.tree = Tree(compiled, inode_of(os.fstat(root_fd)))
        self.directories = Directories(self.tree.root, root_fd, [self.caller], bound)
        judge = Judge(self.events.append, lambda pid: pid == SERVER)
        self.core = Core(self.tree, self.directories, judge, Attributes(caching, Owners()), content)
        self.dispatcher = Dispatcher(self.core)
        self._unique = count(2)

    def send(self, request: bytes) -> tuple[int, bytes] | None:
        """(error, payload)."""
        answered = self.dispatcher.answer(self.caller, memoryview(bytearray(request)))
        if answered is None:
            return None
        head, payload = answered
        length, error, _unique = abi.OUT_HEADER.unpack(head)
        assert length == len(head) + len(payload)
        return error, bytes(payload)

    def ask(self, operation: int, node: int = abi.ROOT_ID, body: bytes = b"", *, pid: int = 1) -> bytes:
        head = abi.IN_HEADER.pack(
            abi.IN_HEADER.size + len(body), operation, next(self._unique), node, os.getuid(), os.getgid(), pid, 0, 0
        )
        answer = self.send(head + body)
        if answer is None:
            return b""
        if answer[0]:
            raise OSError(-answer[0], os.strerror(-answer[0]))
        return answer[1]

    def error(self, operation: int, node: int = abi.ROOT_ID, body: bytes = b"", *, pid: int = 1) -> str | None:
        try:
            self.ask(operation, node, body, pid=pid)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return None

    def walk(self, path: str, *, pid: int = 1) -> int:
        """LOOKUPs along a path; the last node."""
        node = abi.ROOT_ID
        for name in path.split("/"):
            node = abi.ENTRY_OUT.unpack_from(self.ask(abi.LOOKUP, node, os.fsencode(name) + b"\0", pid=pid))[0]
        return node

    def open(self, node: int, flags: int = os.O_RDONLY, *, pid: int = 1) -> int:
        handle: int = abi.OPEN_OUT.unpack(self.ask(abi.OPEN, node, abi.OPEN_IN.pack(flags, 0), pid=pid))[0]
        return handle

    def read(self, handle: int, size: int = 4096, offset: int = 0) -> bytes:
        return self.ask(abi.READ, body=abi.READ_IN.pack(handle, offset, size, 0, 0, 0, 0))

    def write(self, handle: int, data: bytes, offset: int = 0, *, flags: int = 0, write_flags: int = 0) -> int:
        body = abi.WRITE_IN.pack(handle, offset, len(data), write_flags, 0, flags, 0) + data
        written: int = abi.WRITE_OUT.unpack(self.ask(abi.WRITE, body=body))[0]
        return written

    def release(self, handle: int) -> None:
        self.ask(abi.RELEASE, body=abi.RELEASE_IN.pack(handle, 0, 0, 0))

    def create(self, parent: int, name: str, flags: int = os.O_RDWR, *, pid: int = 1) -> tuple[int, int]:
        """(node, handle)"""
        body = abi.CREATE_IN.pack(flags | os.O_CREAT, 0o100644, 0, 0) + os.fsencode(name) + b"\0"
        answer = self.ask(abi.CREATE, parent, body, pid=pid)
        return abi.ENTRY_OUT.unpack_from(answer)[0], abi.OPEN_OUT.unpack_from(answer, abi.ENTRY_OUT.size)[0]

    def rename(self, parent: int, name: str, directory: int, new_name: str, flags: int = 0) -> None:
        names = os.fsencode(name) + b"\0" + os.fsencode(new_name) + b"\0"
        self.ask(abi.RENAME2, parent, abi.RENAME2_IN.pack(directory, flags, 0) + names)

    def close(self) -> None:
        self.dispatcher.close()
        self.directories.close()


MakeKernel = Callable[..., Kernel]


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[MakeKernel]:
    made: list[Kernel] = []

    def make(rules: list[tuple[str, Access]] | None = None, **options: Any) -> Kernel:
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        made.append(Kernel(folder, [("/**", "rw")] if rules is None else rules, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
