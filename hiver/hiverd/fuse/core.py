"""What all operations share: the tree, the folder, the verdicts; and how a request names things."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import NamedTuple

from hiverd.files.acl import Access
from hiverd.fuse.attributes import Attributes
from hiverd.fuse.caller import Caller
from hiverd.fuse.descriptors import Directories, inode_of
from hiverd.fuse.judge import Judge
from hiverd.fuse.nodes import MAX_PATH_BYTES, Node, Tree
from hiverd.remote.content import Content

Answer = bytes | memoryview | None
"""The payload of an answer; None: there is no answer to this operation."""

NOTHING = b""


class Place(NamedTuple):
    """A name in a directory, as a request gives it."""

    parent: Node
    name: bytes
    access: Access


class Handle:
    """An open file or directory. Its number for the kernel is its descriptor."""

    __slots__ = ("exempt", "fd", "node", "writes", "written")

    def __init__(self, fd: int, node: Node, *, writes: bool, exempt: bool) -> None:
        self.fd = fd
        self.node = node
        self.writes = writes
        self.exempt = exempt
        """True: opened by the server, which is neither judged nor told of."""
        self.written = False


class Core:
    """The state of one mount. `content` None: what is in the folder is all there is."""

    def __init__(
        self, tree: Tree, directories: Directories, judge: Judge, attributes: Attributes, content: Content | None
    ) -> None:
        self.tree = tree
        self.directories = directories
        self.judge = judge
        self.attributes = attributes
        self.content = content
        self.pages_refused: Callable[[Node], None] = lambda _node: None
        """Called when pages of a mapping could not be written: the kernel is to drop them. Must not wait."""

    def place(self, number: int, name: bytes) -> Place:
        """A name as the kernel sends it, below a node. `EINVAL` for names that are more than one step."""
        if not name or b"/" in name or b"\0" in name or name in {b".", b".."}:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        tree = self.tree
        parent = tree.node(number)
        if not parent.is_directory:
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return Place(parent, name, tree.child_access(parent, name))

    def path(self, place: Place) -> str:
        """Relative to the mount. `ENAMETOOLONG` for what no path could name."""
        path = f"{place.parent.path}/{os.fsdecode(place.name)}"
        if len(path) > MAX_PATH_BYTES:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        return path

    def folder_fd(self, place: Place, caller: Caller) -> int:
        return self.directories.fd(place.parent, caller)

    def status(self, place: Place, caller: Caller) -> os.stat_result:
        return os.stat(place.name, dir_fd=self.folder_fd(place, caller), follow_symlinks=False)

    def entry(self, place: Place, status: os.stat_result, *, cached: bool) -> bytes:
        """Tells the kernel of an object; it counts that."""
        is_directory = status.st_mode & 0o170000 == 0o040000
        node = self.tree.found(place.parent, place.name, inode_of(status), is_directory=is_directory)
        return self.attributes.entry(node.id, status, cached=cached)

    def status_of(self, node: Node, caller: Caller, handle_fd: int | None = None) -> os.stat_result:
        """By a handle where there is one, so that files without a name have attributes too."""
        if handle_fd is not None:
            return os.fstat(handle_fd)
        if node.parent is None or (node.gone and node.fd >= 0):
            return os.fstat(self.directories.fd(node, caller))
        if node.gone:
            if not node.handles:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            return os.fstat(node.handles[-1])
        status = os.stat(node.name, dir_fd=self.directories.fd(node.parent, caller), follow_symlinks=False)
        if inode_of(status) != node.inode:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return status
