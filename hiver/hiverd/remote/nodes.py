"""Files in use, and the table of all entries: the database for those at rest, objects in memory for those that are
open, pending or on their way. One lock guards both; it is never held while something is waited for.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Final

from hiverd.clock import Clock
from hiverd.remote.calls import Kind, Remote
from hiverd.remote.ranges import Ranges
from hiverd.remote.state import Intent, Row, State
from hiverd.remote.tree import Tree, empty

log = logging.getLogger(__name__)

NEVER: Final = float("-inf")
OPENED_COUNT: Final = 100_000
INTENT_SECONDS: Final = 30.0
"""The folder follows the database within microseconds; after this long it is made to."""


class Fetch:
    """A request for a range, under way."""

    __slots__ = ("end", "error", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.error: Exception | None = None


class Node:
    """One file. Attributes change under the table's lock."""

    __slots__ = (
        "accounted",
        "ahead",
        "asked",
        "attempts",
        "behind",
        "error",
        "fetches",
        "first_change",
        "generation",
        "gone",
        "last_change",
        "lock",
        "mtime_ns",
        "next_offset",
        "opens",
        "path",
        "pending",
        "pins",
        "present",
        "progress",
        "room",
        "since",
        "size",
        "unsettled",
        "used",
        "version",
        "window",
    )

    def __init__(self, path: str, version: str | None, size: int, mtime_ns: int, present: Ranges) -> None:
        self.path = path
        self.version = version
        self.size = size
        """Of the backend's object; while pending, of the file at its last close."""
        self.mtime_ns = mtime_ns
        self.present = present
        self.pending = False
        self.since = 0.0
        self.attempts = 0
        self.error: str | None = None
        self.used = 0.0

        self.opens = 0
        self.pins = 0
        """Uses besides handles: it stays in memory, and its content on the disk."""
        self.generation = 0
        """Counts changes of the content."""
        self.first_change = NEVER
        """Since the last upload began; monotonic, as the two that follow."""
        self.last_change = NEVER
        self.asked = NEVER
        """When the backend last said what it is."""
        self.unsettled = False
        """It was uploaded while it was open: what a handle that wrote was about to write may be missing."""
        self.behind: Remote | None = None
        """What the backend has by now, while those who have the file open keep what they had."""
        self.gone = False
        """The name is another file's, or nobody's; only handles are left."""
        self.fetches: list[Fetch] = []
        self.progress = asyncio.Event()
        """Set and replaced whenever content arrives or a fetch ends; on the loop only."""
        self.lock = asyncio.Lock()
        """Held by who calls the backend about the object as a whole: upload, delete, move."""
        self.next_offset = 0
        self.window = 0
        self.ahead = 0
        self.accounted = (0, 0)

    def complete(self) -> bool:
        return self.pending or self.version is None or self.present.covers(0, self.size)

    def has(self, start: int, end: int) -> bool:
        return self.pending or self.version is None or self.present.covers(start, min(end, self.size))

    def row(self) -> Row:
        clean = not self.pending and self.version is not None
        return Row(
            self.path,
            "file",
            self.version,
            self.size,
            self.mtime_ns,
            present=self.present.encode() if clean else None,
            cached=self.present.total if clean else 0,
            used=self.used,
            pending=int(self.pending),
            since=self.since,
            attempts=self.attempts,
            error=self.error,
        )


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
        self.gone: dict[str, list[Node]] = {}
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
        if node.behind is not None:
            remote, node.behind = node.behind, None
            self.take(node, remote)
        self.save(node)
        if self.nodes.get(node.path) is node:
            del self.nodes[node.path]

    def remove(self, node: Node) -> None:
        """The name goes; handles keep the file."""
        node.gone = True
        node.pending = False
        self.account(node)
        if self.nodes.get(node.path) is node:
            del self.nodes[node.path]
        if node.opens:
            self.gone.setdefault(node.path, []).append(node)
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
        if node.behind is not None:
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
        self.changed(node.path)
        if node.opens and node.present.total:
            node.behind = remote
            return False
        self.reset(node, remote.size, remote.mtime_ns)
        node.version = remote.version
        self.save(node)
        return True

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

    def forget_directory(self, path: str, keep: Collection[str] = ()) -> None:
        """The backend has it no more: all goes but what it never had, with the directories on the way there."""
        kept = set(keep)
        for node in self.hot_below(path):
            if node.pending or node.version is None:
                self.save(node)
        rows = [*self.state.below(path), self.state.load(path)]
        doomed = []
        for row in sorted((row for row in rows if row is not None), key=lambda row: row.path, reverse=True):
            if row.pending or (row.kind == "file" and row.version is None):
                kept.add(row.path)
            elif row.kind != "directory" or not any(other.startswith(row.path + "/") for other in kept):
                hot = self.nodes.get(row.path)
                if hot is not None:
                    self.remove(hot)
                else:
                    self.cached_bytes -= row.cached
                doomed.append(row)
        self.state.delete_all(row.path for row in doomed)
        for row in doomed:
            self.tree.remove(row.path)
        self.changed(path, below=True)
