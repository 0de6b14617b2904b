"""Descriptors of the folder's directories: each opened below its parent's, never through a link, a bounded number.

A descriptor that falls out of the bound may be in use by another thread. So it is closed only when every thread that
was at work by then has finished its request (`Using.since`).
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Sequence
from typing import Final, Protocol

from hiverd.fuse.nodes import Node

MAX_OPEN_DIRECTORIES: Final = 1024
_FLAGS: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Using(Protocol):
    """A thread that asks for descriptors."""

    since: int
    """0 between requests, else the generation at its request's first use of a descriptor."""


def inode_of(status: os.stat_result) -> int:
    """One number for an object of the folder, whatever file systems lie in it."""
    return status.st_dev << 64 | status.st_ino


class Directories:
    """`fd` gives descriptors that are good until the caller sets `since` back to 0."""

    def __init__(self, root: Node, root_fd: int, users: Sequence[Using], bound: int = MAX_OPEN_DIRECTORIES) -> None:
        self.root_fd = root_fd
        root.fd = root_fd
        self._users = users
        self._bound = bound
        self._open: deque[Node] = deque()
        self._retired: deque[tuple[int, int]] = deque()
        self._generation = 1
        self._lock = threading.Lock()

    def fd(self, node: Node, user: Using) -> int:
        """An O_PATH descriptor of a directory. `ESTALE`: it is no longer where the kernel found it."""
        if not user.since:
            user.since = self._generation
        fd = node.fd
        if fd >= 0:
            node.fd_used = True
            return fd
        with self._lock:
            return self._reopen(node)

    def forgotten(self, node: Node) -> None:
        """The kernel no longer knows this node."""
        if node.fd >= 0:
            with self._lock:
                self._retire(node)
                self._close_retired()

    def close(self) -> None:
        """When nothing is served any more."""
        with self._lock:
            for node in self._open:
                if node.fd >= 0:
                    os.close(node.fd)
                    node.fd = -1
            for _generation, fd in self._retired:
                os.close(fd)
            self._open.clear()
            self._retired.clear()
            os.close(self.root_fd)

    def _reopen(self, node: Node) -> int:
        chain: list[Node] = []
        at: Node = node
        while at.fd < 0:
            if at.gone or at.parent is None:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            chain.append(at)
            at = at.parent
        fd = at.fd
        for one in reversed(chain):
            fd = self._open_one(one, fd)
        return fd

    def _open_one(self, node: Node, parent_fd: int) -> int:
        fd = os.open(node.name, _FLAGS, dir_fd=parent_fd)
        if inode_of(os.fstat(fd)) != node.inode:
            os.close(fd)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        node.fd, node.fd_used = fd, True
        self._open.append(node)
        self._shrink(node)
        return fd

    def _shrink(self, newest: Node) -> None:
        """Second chance: what was used since the last look stays once more."""
        while len(self._open) > self._bound:
            node = self._open.popleft()
            if node.fd < 0:
                continue
            if node is newest or node.fd_used:
                node.fd_used = False
                self._open.append(node)
            else:
                self._retire(node)
        self._close_retired()

    def _retire(self, node: Node) -> None:
        fd, node.fd = node.fd, -1
        self._generation += 1
        self._retired.append((self._generation, fd))

    def _close_retired(self) -> None:
        oldest = min((user.since for user in list(self._users) if user.since), default=self._generation + 1)
        while self._retired and self._retired[0][0] <= oldest:
            os.close(self._retired.popleft()[1])
