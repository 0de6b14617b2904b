"""What the kernel knows of the tree: numbered nodes, each one a name below another (fuse.h, LOOKUP and FORGET).

A node stands for one path, never for a path's history: who finds another object under a name gets another node. Its
access is remembered until the rules or a directory's name change (`Tree.epoch`).
"""

from __future__ import annotations

import errno
import os
import threading
from itertools import count
from typing import Final

from hiverd.files.acl import Access, Rules
from hiverd.fuse import abi

MAX_PATH_BYTES: Final = 4095
"""Deeper directories could only be reached step by step, and their paths would make memory hostile."""


class Node:
    """One name that the kernel remembers. Only `Tree` changes it, but for `handles` and the directory descriptor."""

    __slots__ = (
        "access",
        "children",
        "epoch",
        "fd",
        "fd_used",
        "free",
        "gone",
        "handles",
        "id",
        "inode",
        "is_directory",
        "lookups",
        "name",
        "parent",
        "path",
        "seen",
    )

    def __init__(self, number: int, parent: Node | None, name: bytes, inode: int, *, is_directory: bool) -> None:
        self.id = number
        self.parent = parent
        self.name = name
        self.inode = inode
        self.is_directory = is_directory
        self.lookups = 0
        self.children: dict[bytes, Node] = {}
        self.handles: list[int] = []
        """Descriptors of its open handles."""
        self.gone = False
        """True: removed from the folder, or replaced there."""
        self.fd = -1
        """Of a directory: an O_PATH descriptor (`hiverd.fuse.descriptors`)."""
        self.fd_used = False
        self.seen: object = None
        """What a file looked like when it was last opened, where others may change the folder."""
        self.epoch = -1
        self.access: Access = "deny"
        self.free = False
        """True: everything below is `rw`, so names need not be judged one by one."""
        self.path = ""
        """Of a directory, relative to the mount and empty for the mount itself; good for this epoch."""


class Tree:
    """The table of nodes. All methods may be called from any thread."""

    def __init__(self, rules: Rules, root_inode: int) -> None:
        self.rules = rules
        self.epoch = 0
        self.root = Node(abi.ROOT_ID, None, b"", root_inode, is_directory=True)
        self.root.lookups = 1
        self._nodes: dict[int, Node] = {abi.ROOT_ID: self.root}
        self._numbers = count(abi.ROOT_ID + 1)
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._nodes)

    def node(self, number: int) -> Node:
        """`ESTALE` for a number that the kernel should have forgotten."""
        try:
            node = self._nodes[number]
        except KeyError:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from None
        if node.epoch != self.epoch:
            self._judge(node)
        return node

    def all_nodes(self) -> list[Node]:
        return list(self._nodes.values())

    def set_rules(self, rules: Rules) -> None:
        with self._lock:
            self.rules = rules
            self.epoch += 1

    def path_of(self, node: Node) -> str:
        """Relative to the mount, `/` for the mount itself. Of a node that is gone: where it was last."""
        if node.parent is None:
            return "/"
        self.fresh(node)
        return node.path if node.is_directory else f"{node.parent.path}/{os.fsdecode(node.name)}"

    def fresh(self, node: Node) -> Node:
        """The node, judged by the rules of now."""
        if node.epoch != self.epoch:
            self._judge(node)
        return node

    def child_access(self, parent: Node, name: bytes) -> Access:
        """The access of a name, whether it exists or not. `parent` is fresh."""
        if parent.free:
            return "rw"
        if parent.access == "deny":
            return "deny"
        return self.rules.own_access(f"{parent.path}/{os.fsdecode(name)}")

    def found(self, parent: Node, name: bytes, inode: int, *, is_directory: bool) -> Node:
        """The node that an answer with an entry tells the kernel; it will send as many FORGETs."""
        with self._lock:
            node = parent.children.get(name)
            if node is not None and (node.inode != inode or node.is_directory != is_directory):
                self._detach(node)
                node = None
            if node is None:
                node = Node(next(self._numbers), parent, name, inode, is_directory=is_directory)
                parent.children[name] = node
                self._nodes[node.id] = node
                self._judge(node)
            elif not node.lookups:
                # Forgotten, but still here because of what is below it.
                self._nodes[node.id] = node
            node.lookups += 1
        return node

    def forget(self, number: int, lookups: int) -> Node | None:
        """The kernel drops so many references. The node if it has left the table by that."""
        with self._lock:
            node = self._nodes.get(number)
            if node is None or node is self.root:
                return None
            node.lookups = max(0, node.lookups - lookups)
            if node.lookups:
                return None
            left = self._nodes.pop(number)
            self._prune(node)
            return left

    def removed(self, parent: Node, name: bytes) -> None:
        """The folder no longer has this name."""
        with self._lock:
            node = parent.children.get(name)
            if node is not None:
                self._detach(node)

    def renamed(self, source: Node, name: bytes, target: Node, new_name: bytes, *, exchange: bool) -> None:
        """The folder has renamed; what was at the target is gone, or has taken the source's place."""
        with self._lock:
            moved = source.children.pop(name, None)
            other = target.children.pop(new_name, None)
            if other is not None:
                if exchange:
                    self._place(other, source, name)
                else:
                    self._detach(other)
            if moved is not None:
                self._place(moved, target, new_name)

    def _place(self, node: Node, parent: Node, name: bytes) -> None:
        before = node.parent
        node.parent, node.name = parent, name
        parent.children[name] = node
        if node.is_directory:
            self.epoch += 1
        else:
            node.epoch = -1
        if before is not None and before is not parent:
            self._prune(before)

    def _detach(self, node: Node) -> None:
        # What is below it stays reachable from it, for those who have it open.
        node.gone = True
        if node.parent is not None and node.parent.children.get(node.name) is node:
            del node.parent.children[node.name]

    def _prune(self, node: Node) -> None:
        """Takes nodes out of their parents that the kernel has forgotten and that hold nothing.

        A forgotten directory stays where it is while something below it is known, so that it is found again.
        """
        while node.parent is not None and not node.lookups and not node.children:
            parent = node.parent
            if parent.children.get(node.name) is node:
                del parent.children[node.name]
            node = parent

    def _judge(self, node: Node) -> None:
        with self._lock:
            chain = [node]
            while (parent := chain[-1].parent) is not None and parent.epoch != self.epoch:
                chain.append(parent)
            for one in reversed(chain):
                self._judge_one(one)

    def _judge_one(self, node: Node) -> None:
        parent = node.parent
        if parent is None:
            node.path = ""
            node.access = self.rules.access("/")
        else:
            if node.is_directory:
                node.path = f"{parent.path}/{os.fsdecode(node.name)}"
            node.access = self.child_access(parent, node.name)
        if node.is_directory:
            inherited = parent is not None and parent.free
            node.free = inherited or (node.access == "rw" and not self.rules.withholds_below(node.path or "/"))
        node.epoch = self.epoch
