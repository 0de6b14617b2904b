"""One directory of the folder becomes like the backend's: what is new is made, what has changed loses its content, what
has gone goes. What is ours, because it is pending or the backend never had it, stays.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Collection, Iterable

from hiverd.remote.calls import Remote
from hiverd.remote.node import Node
from hiverd.remote.nodes import Table
from hiverd.remote.shared import Shared
from hiverd.remote.state import Row
from hiverd.remote.tree import is_name, join, make_directory, make_file, make_link, split

log = logging.getLogger(__name__)


class Reconciliation:
    """One directory of the folder becomes like the backend's. Methods run in worker threads, one after the other."""

    def __init__(self, shared: Shared, directory: str, touched: Collection[str]) -> None:
        self._shared = shared
        self._table: Table = shared.table
        self._tree = shared.tree
        self._directory = directory
        self._touched = touched
        self._rows: dict[str, Row] = {}
        self._seen: set[str] = set()
        self._first = True
        self.ended = False
        """Nobody notes any more what is touched. A thread that is still on its way does nothing."""

    def compare_with_folder(self) -> None:
        """After a crash the records and the folder may differ by what was under way. What only the folder has is kept:
        it is ours. What only the records have is made anew when the backend lists it."""
        table = self._table
        with table.lock:
            try:
                with self._tree.directory(self._directory) as fd:
                    found = {
                        entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(f"/proc/self/fd/{fd}")
                    }
            except (FileNotFoundError, NotADirectoryError):
                found = {}
            recorded = {row.path: row for row in table.state.children(self._directory)}
            for name, status in found.items():
                path = join(self._directory, name)
                if path not in recorded and path not in table.nodes and not self._is_changing(path):
                    self._adopt(path, status)
            for path, row in recorded.items():
                known = split(path)[1] in found or path in table.nodes or row.pending or self._is_changing(path)
                if not known:
                    table.cached_bytes -= row.cached
                    table.state.delete_all([path, *(below.path for below in table.state.below(path))])

    def _is_changing(self, path: str) -> bool:
        return split(path)[1] in self._touched or path in self._table.intents

    def _adopt(self, path: str, status: os.stat_result) -> None:
        if stat.S_ISREG(status.st_mode):
            node = self._table.add(path)
            node.size = status.st_size
            if status.st_size:
                self._table.begin_pending(node)
            self._table.rest(node)
        elif stat.S_ISDIR(status.st_mode):
            self._table.state.save(Row(path, "directory", None, 0, 0))
        else:
            self._tree.remove(path)

    def prepare(self) -> None:
        with self._table.lock:
            self._rows = {row.path: row for row in self._table.state.children(self._directory)}
            self._first = not self._rows

    def follow(self, batch: Iterable[Remote]) -> None:
        table = self._table
        new: list[Row] = []
        with table.lock, self._tree.directory(self._directory) as fd:
            if self.ended:
                return
            owner = self._tree.owner()
            for remote in batch:
                parent, name = split(remote.path)
                if parent != self._directory or not is_name(name):
                    log.warning("%s: the service has a name that cannot be one here; left out", self._directory)
                    continue
                self._seen.add(remote.path)
                if name not in self._touched:
                    row = self._one(fd, name, remote, owner)
                    if row is not None:
                        new.append(row)
            table.state.save_all(new)
            table.state.commit()

    def _one(self, fd: int, name: str, remote: Remote, owner: tuple[int, int]) -> Row | None:
        """A row to add, if the entry is new."""
        node = self._table.nodes.get(remote.path)
        row = self._rows.get(remote.path)
        if node is not None:
            self._hot(node, remote)
            return None
        if row is None:
            return self._make(fd, name, remote, owner)
        if row.kind == "file" and (row.pending or row.version == remote.version):
            return None
        if row.kind == remote.kind != "file" and row.target == remote.target:
            return None
        if row.kind == remote.kind == "file":
            found = self._table.find(remote.path)
            if found is not None:
                self._replace(found, remote)
            return None
        self._drop(row)
        return self._make(fd, name, remote, owner) if self._table.kind_of(remote.path) is None else None

    def _hot(self, node: Node, remote: Remote) -> None:
        if remote.kind == "file" and node.version == remote.version:
            node.asked = self._shared.now()
            node.vanished = False
        elif remote.kind == "file" and node.version is not None:
            self._replace(node, remote)

    def _replace(self, node: Node, remote: Remote) -> None:
        if self._table.take(node, remote) and not node.pins:
            self._table.rest(node)

    def _make(self, fd: int, name: str, remote: Remote, owner: tuple[int, int]) -> Row | None:
        try:
            if remote.kind == "file":
                make_file(fd, name, remote.size, remote.mtime_ns, owner)
            elif remote.kind == "directory":
                make_directory(fd, name, owner)
            else:
                make_link(fd, name, remote.target, owner)
        except FileExistsError:  # the workload is making it right now: its own call says what it is
            return None
        except OSError as error:
            log.warning("%s: cannot be made in the folder: %s", remote.path, error.strerror)
            return None
        if not self._first:
            self._table.changed(remote.path)
        version = remote.version if remote.kind == "file" else None
        return Row(remote.path, remote.kind, version, remote.size, remote.mtime_ns, remote.target)

    def _drop(self, row: Row) -> None:
        table = self._table
        if row.kind == "directory":
            table.forget_directory(row.path)
        elif row.kind == "link":
            table.state.delete(row.path)
            self._tree.remove(row.path)
            table.changed(row.path)
        else:
            node = table.find(row.path)
            if node is not None:
                table.vanish(node)
                if not node.pins:
                    table.rest(node)

    def finish(self) -> None:
        """What the backend did not name has gone, unless it is ours."""
        with self._table.lock:
            for path, row in self._rows.items():
                if path in self._seen or split(path)[1] in self._touched or row.pending:
                    continue
                if row.kind != "file" or row.version is not None:
                    self._vanished(path)
            self._table.state.commit()

    def _vanished(self, path: str) -> None:
        """As of now, not as of when the listing began: it may have been renamed, changed or uploaded since."""
        row = self._table.state.load(path)
        if row is not None and not (row.kind == "file" and self._is_ours(row)):
            self._drop(row)

    def _is_ours(self, row: Row) -> bool:
        node = self._table.nodes.get(row.path)
        if node is not None:
            return node.pending or node.version is None
        return bool(row.pending) or row.version is None
