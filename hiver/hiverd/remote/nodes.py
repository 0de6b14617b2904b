"""The table of all entries: the database for those at rest, objects in memory for those that are
open, pending or on their way. One lock guards both; it is never held while something is waited for.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from hiverd.clock import Clock
from hiverd.remote.calls import Kind, Remote
from hiverd.remote.node import Node
from hiverd.remote.ranges import Ranges
from hiverd.remote.state import Intent, Row, State
from hiverd.remote.tree import Tree, empty

log = logging.getLogger(__name__)

OPENED_COUNT: Final = 100_000
INTENT_SECONDS: Final = 30.0
"""The folder follows the database within microseconds; after this long it is made to."""


class Table:
    def __init__(self, state: State, tree: Tree, clock: Clock, changed: Callable[[str], None]) -> None:
        self.lock = threading.RLock()
        self.state = state
        self.tree = tree
        self.clock = clock
        self._changed = changed
        self.opened: set[str] = set()
        """Paths whose content is the one of their last open, so that what the kernel caches of it is good."""
        self.nodes: dict[str, Node] = {}
        self.pending: set[Node] = set()
        self.cached_bytes = state.cached_bytes()
        self.dirty_bytes = 0
        self.intents: dict[str, tuple[Intent, float]] = {}
        """By source, with the monotonic time of each."""

    def changed(self, path: str, *, below: bool = False) -> None:
        """Another writer of the service has changed what is there, or whether it is there."""
        self.opened.discard(path)
        if below:
            self.opened = {other for other in self.opened if not other.startswith(path + "/")}
        self._changed(path)

    def note_opened(self, path: str) -> None:
        if len(self.opened) >= OPENED_COUNT:
            self.opened.clear()
        self.opened.add(path)

    # -- files

    def find(self, path: str) -> Node | None:
        """The file of that name, brought into memory. What does not fit what is recorded is not served."""
        node = self.nodes.get(path)
        if node is not None:
            return node
        row = self.state.load(path)
        if row is None or row.kind != "file":
            return None
        node = self._restore(row)
        self.nodes[path] = node
        return node

    def _restore(self, row: Row) -> Node:
        node = Node(row.path, row.version, row.size, row.mtime_ns, Ranges.decode(row.present))
        node.pending = bool(row.pending)
        node.since, node.attempts, node.error, node.used = row.since, row.attempts, row.error, row.used
        node.accounted = (row.cached, 0)
        found = self.tree.status(row.path)
        if found is None or node.pending or node.version is None:
            return node
        if found.st_size != row.size or found.st_mtime_ns != row.mtime_ns:
            log.info("%s: content on the disk is not what is recorded; it will be fetched again", row.path)
            self.reset(node, row.size, row.mtime_ns)
        return node

    def add(self, path: str) -> Node:
        """A new, empty file that the backend does not have."""
        old = self.find(path)
        if old is not None:
            self.remove(old)
        self.opened.discard(path)
        node = Node(path, None, 0, 0, Ranges())
        self.nodes[path] = node
        return node

    def save(self, node: Node) -> None:
        """Writes the row and counts; the next commit makes it durable."""
        self.account(node)
        if not node.gone:
            self.state.save(node.row())

    def account(self, node: Node) -> None:
        cached = node.present.total if node.version is not None and not node.pending and not node.gone else 0
        dirty = node.size if node.pending else 0
        self.cached_bytes += cached - node.accounted[0]
        self.dirty_bytes += dirty - node.accounted[1]
        node.accounted = (cached, dirty)
        if node.pending:
            self.pending.add(node)
        else:
            self.pending.discard(node)

    def rest(self, node: Node) -> None:
        """Takes a file out of memory when nothing needs it there."""
        if node.opens or node.pins or node.pending or node.gone or node.fetches:
            return
        if node.vanished:
            self.vanish(node)
            return
        if node.behind is not None:
            remote, node.behind = node.behind, None
            self.take(node, remote)
        self.save(node)
        if self.nodes.get(node.path) is node:
            del self.nodes[node.path]

    def remove(self, node: Node) -> None:
        """The name goes; handles keep the file, and nothing is asked about them any more."""
        node.gone = True
        node.pending = False
        self.account(node)
        if self.nodes.get(node.path) is node:
            del self.nodes[node.path]
        self.state.delete(node.path)

    def rename(self, node: Node, path: str) -> None:
        if self.nodes.get(node.path) is node:
            del self.nodes[node.path]
        self.opened.discard(path)
        if node.path in self.opened:
            self.opened.discard(node.path)
            self.opened.add(path)
        node.path = path
        self.nodes[path] = node

    # -- content

    def begin_pending(self, node: Node) -> None:
        """Durable when this returns: from now on the file's content is the truth, and not on the backend."""
        node.pending = True
        node.since = self.clock.wall()
        node.attempts, node.error = 0, None
        node.first_change = self.clock.monotonic()
        node.vanished = False
        node.behind = None  # ours was made from the older version: the upload will find the conflict
        self.save(node)
        self.forget_intents(node.path)
        self.state.commit()

    def end_pending(self, node: Node) -> None:
        """The backend has it, as `node.version`."""
        node.pending = False
        node.present = Ranges.whole(node.size)
        node.attempts, node.error = 0, None
        node.used = self.clock.wall()
        self.save(node)

    def take(self, node: Node, remote: Remote) -> bool:
        """The backend's object is another version than ours. False if that has to wait: what is pending is judged by
        its upload, what is open stays as it is until it is closed."""
        if node.pending or node.gone:
            return False
        node.vanished = False
        self.changed(node.path)
        if node.opens and node.present.total:
            node.behind = remote
            return False
        self.reset(node, remote.size, remote.mtime_ns)
        node.version = remote.version
        self.save(node)
        return True

    def vanish(self, node: Node) -> None:
        """The backend's object has gone; so does ours, when nobody has it open and unless it is ours alone."""
        if node.pending or node.gone or node.version is None:
            return
        if node.opens:
            node.vanished = True
            return
        self.remove(node)
        self.tree.remove(node.path)
        self.changed(node.path)

    def reset(self, node: Node, size: int, mtime_ns: int) -> None:
        """A placeholder again. The record goes first, so that a crash in between is seen."""
        node.present = Ranges()
        node.ahead = node.next_offset = node.window = 0
        node.size, node.mtime_ns = size, mtime_ns
        self.save(node)
        self.state.commit()
        try:
            with self.tree.opened(node.path, os.O_WRONLY) as fd:
                empty(fd, size, mtime_ns)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}:
                raise

    # -- intents

    def intend(self, source: str, target: str | None) -> None:
        """The folder will follow in a moment; if that does not come to pass, it is made to."""
        found = self.tree.status(source)
        if found is not None:
            self.forget_intents(source)
            wall = self.clock.wall()
            number = self.state.intend(source, target, found.st_ino, wall)
            self.intents[source] = (Intent(number, source, target, found.st_ino, wall), self.clock.monotonic())

    def forget_intents(self, path: str) -> None:
        """Something new has this name, and possibly the inode of what was to go."""
        intent = self.intents.pop(path, None)
        if intent is not None:
            self.state.drop_intents([intent[0].id])

    def finish_intents(self) -> None:
        """Those that are old enough for the folder to have followed."""
        limit = self.clock.monotonic() - INTENT_SECONDS
        for intent, at in [*self.intents.values()]:
            if at < limit:
                self.finish(intent)
                self.forget_intents(intent.source)

    def finish(self, intent: Intent) -> None:
        found = self.tree.status(intent.source)
        if found is None or found.st_ino != intent.inode:
            return
        if intent.target is None:
            self.tree.remove(intent.source)
            return
        with suppress(OSError):
            self.tree.rename(intent.source, intent.target)

    # -- directories

    def kind_of(self, path: str) -> Kind | None:
        if path == "/":
            return "directory"
        if path in self.nodes:
            return "file"
        row = self.state.load(path)
        return row.kind if row else None

    def hot_below(self, directory: str) -> list[Node]:
        prefix = directory.rstrip("/") + "/"
        return [node for path, node in self.nodes.items() if path.startswith(prefix)]

    def move_directory(self, source: str, target: str) -> None:
        """All below gets its new path; content stays, versions are compared at the next listing."""
        hot = self.hot_below(source)
        for node in hot:
            self.save(node)
        self.state.move(source, target)
        for node in hot:
            self.rename(node, target + node.path[len(source) :])

    def forget_directory(self, path: str) -> None:
        """The backend has it no more: all goes but what it never had or what is open, with the directories above."""
        kept: set[str] = set()
        for node in self.hot_below(path):
            self.save(node)
            node.vanished = node.opens > 0 and node.version is not None and not node.pending
        doomed = []
        rows = [*self.state.below(path), self.state.load(path)]
        for row in sorted((row for row in rows if row is not None), key=lambda row: row.path, reverse=True):
            hot = self.nodes.get(row.path)
            if row.pending or (row.kind == "file" and row.version is None) or (hot is not None and hot.vanished):
                kept.add(row.path)
            elif row.kind != "directory" or not any(other.startswith(row.path + "/") for other in kept):
                if hot is not None:
                    self.remove(hot)
                else:
                    self.cached_bytes -= row.cached
                doomed.append(row)
        self.state.delete_all(row.path for row in doomed)
        for row in doomed:
            self.tree.remove(row.path)
        self.changed(path, below=True)
