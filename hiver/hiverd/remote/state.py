"""The database beside the folder: what each entry is a copy of, and what is pending.

WAL with synchronous=NORMAL: what is committed survives a killed process, and a commit costs some microseconds. What
need not be durable at once waits for the next commit. All calls are made under the table's lock (`nodes.Table`).
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from hiverd.remote.calls import Kind

SCHEMA: Final[tuple[str, ...]] = (
    """
    CREATE TABLE entries (
        path BLOB PRIMARY KEY,
        parent BLOB NOT NULL,
        kind TEXT NOT NULL,
        version TEXT,
        size INTEGER NOT NULL,
        mtime_ns INTEGER NOT NULL,
        target BLOB NOT NULL DEFAULT x'',
        present BLOB,
        cached INTEGER NOT NULL DEFAULT 0,
        used REAL NOT NULL DEFAULT 0,
        pending INTEGER NOT NULL DEFAULT 0,
        since REAL NOT NULL DEFAULT 0,
        attempts INTEGER NOT NULL DEFAULT 0,
        error TEXT
    ) WITHOUT ROWID;
    CREATE INDEX entries_parent ON entries (parent);
    CREATE INDEX entries_pending ON entries (pending) WHERE pending;
    CREATE INDEX entries_used ON entries (used) WHERE cached > 0;
    CREATE TABLE intents (
        id INTEGER PRIMARY KEY,
        source BLOB NOT NULL,
        target BLOB,
        inode INTEGER NOT NULL,
        at REAL NOT NULL
    );
    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    """,
)
"""Step N brings the schema from version N to N+1. Never edited once released, only added to."""


class Row(NamedTuple):
    path: str
    kind: Kind
    version: str | None
    """Of the backend's object that this is, or was made from; None: the backend has none."""
    size: int
    mtime_ns: int
    target: str = ""
    present: bytes | None = None
    cached: int = 0
    """Bytes on the disk that may be freed: 0 while pending."""
    used: float = 0.0
    """Last use, seconds since the epoch."""
    pending: int = 0
    since: float = 0.0
    attempts: int = 0
    error: str | None = None


class Intent(NamedTuple):
    """The database has gone ahead of the folder: the entry with this inode is to go, or to be renamed."""

    id: int
    source: str
    target: str | None
    inode: int
    at: float


_COLUMNS: Final = "path, kind, version, size, mtime_ns, target, present, cached, used, pending, since, attempts, error"
_UPSERT: Final = f"INSERT OR REPLACE INTO entries (parent, {_COLUMNS}) VALUES ({', '.join('?' * 14)})"  # noqa: S608


class State:
    def __init__(self, path: Path) -> None:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=10000", "wal_autocheckpoint=4000"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._migrate(path)

    def _migrate(self, path: Path) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > len(SCHEMA):
            self._connection.close()
            raise OSError(f"{path} was written by a newer hiver (schema {version})")
        for number in range(version, len(SCHEMA)):
            self._connection.executescript(f"BEGIN; {SCHEMA[number]} PRAGMA user_version={number + 1}; COMMIT;")

    def close(self) -> None:
        self.commit()
        self._connection.close()

    def _write(self, statement: str, parameters: Sequence[object] = ()) -> sqlite3.Cursor:
        if not self._connection.in_transaction:
            self._connection.execute("BEGIN IMMEDIATE")
        return self._connection.execute(statement, parameters)

    def commit(self) -> None:
        """Everything written so far is durable afterwards."""
        if self._connection.in_transaction:
            self._connection.execute("COMMIT")

    # -- entries

    def load(self, path: str) -> Row | None:
        query = f"SELECT {_COLUMNS} FROM entries WHERE path = ?"  # noqa: S608
        found = self._connection.execute(query, (os.fsencode(path),)).fetchone()
        return _row(found) if found else None

    def _select(self, condition: str, parameters: Sequence[object] = ()) -> list[Row]:
        query = f"SELECT {_COLUMNS} FROM entries WHERE {condition}"  # noqa: S608
        return [_row(found) for found in self._connection.execute(query, parameters)]

    def children(self, directory: str) -> list[Row]:
        return self._select("parent = ?", (os.fsencode(directory),))

    def below(self, directory: str) -> list[Row]:
        """Everything in a directory, however deep, in order of the paths."""
        return self._select("path > ? AND path < ? ORDER BY path", _bounds(directory))

    def pending(self) -> list[Row]:
        return self._select("pending")

    def least_used(self, count: int) -> list[Row]:
        """Of those that have content to free."""
        return self._select("cached > 0 ORDER BY used LIMIT ?", (count,))

    def cached_bytes(self) -> int:
        (total,) = self._connection.execute("SELECT coalesce(sum(cached), 0) FROM entries WHERE cached > 0").fetchone()
        return int(total)

    def save(self, row: Row) -> None:
        self._write(_UPSERT, _values(row))

    def save_all(self, rows: Iterable[Row]) -> None:
        if not self._connection.in_transaction:
            self._connection.execute("BEGIN IMMEDIATE")
        self._connection.executemany(_UPSERT, map(_values, rows))

    def delete(self, path: str) -> None:
        self._write("DELETE FROM entries WHERE path = ?", (os.fsencode(path),))

    def delete_all(self, paths: Iterable[str]) -> None:
        if not self._connection.in_transaction:
            self._connection.execute("BEGIN IMMEDIATE")
        self._connection.executemany("DELETE FROM entries WHERE path = ?", ((os.fsencode(path),) for path in paths))

    def move(self, source: str, target: str) -> None:
        """An entry and all below it; what was at the target is replaced."""
        rows = self._select("path = ?", (os.fsencode(source),)) + self.below(source)
        self.delete_all([target, *(row.path for row in self.below(target)), *(row.path for row in rows)])
        self.save_all(row._replace(path=target + row.path[len(source) :]) for row in rows)

    def forget_content(self) -> None:
        """Nothing that is not pending counts as here any more."""
        self._write("UPDATE entries SET present = NULL, cached = 0 WHERE NOT pending AND version IS NOT NULL")

    # -- intents and facts

    def intend(self, source: str, target: str | None, inode: int, at: float) -> int:
        parameters = (os.fsencode(source), None if target is None else os.fsencode(target), inode, at)
        return (
            self._write("INSERT INTO intents (source, target, inode, at) VALUES (?, ?, ?, ?)", parameters).lastrowid
            or 0
        )

    def intents(self) -> list[Intent]:
        query = "SELECT id, source, target, inode, at FROM intents ORDER BY id"
        return [
            Intent(number, os.fsdecode(source), None if target is None else os.fsdecode(target), inode, at)
            for number, source, target, inode, at in self._connection.execute(query)
        ]

    def drop_intents(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._write("DELETE FROM intents WHERE id = ?", (number,))

    def fact(self, name: str) -> str | None:
        found = self._connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return found[0] if found else None

    def set_fact(self, name: str, value: str) -> None:
        self._write("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))


def _bounds(directory: str) -> tuple[bytes, bytes]:
    prefix = os.fsencode(directory.rstrip("/"))
    return prefix + b"/", prefix + b"0"  # the byte behind the slash


def _row(found: Sequence[object]) -> Row:
    row = Row(*found)  # type: ignore[arg-type]
    return row._replace(path=os.fsdecode(row.path), target=os.fsdecode(row.target))


def _values(row: Row) -> tuple[object, ...]:
    path = os.fsencode(row.path)
    parent = path.rpartition(b"/")[0] or b"/"
    return (parent, path, *row[1:5], os.fsencode(row.target), *row[6:])
