"""One SQLite file: WAL, one writer, one reader, numbered migrations."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import aiosqlite

from hiverd.contracts.errors import UnavailableError

MIGRATIONS: Final[tuple[str, ...]] = (
    """
    CREATE TABLE sandboxes (
        id TEXT PRIMARY KEY,
        key TEXT NOT NULL UNIQUE,
        slot INTEGER NOT NULL UNIQUE,
        status TEXT NOT NULL CHECK (status IN ('starting', 'running', 'stopping')),
        backend TEXT NOT NULL,
        config BLOB NOT NULL,
        spec BLOB,
        state BLOB,
        created_at REAL NOT NULL,
        last_activity_at REAL NOT NULL,
        last_event_id INTEGER NOT NULL DEFAULT 0,
        log_position TEXT
    ) WITHOUT ROWID;
    CREATE TABLE events (
        sandbox_id TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
        id INTEGER NOT NULL,
        body BLOB NOT NULL,
        PRIMARY KEY (sandbox_id, id)
    ) WITHOUT ROWID;
    CREATE TABLE leases (
        name TEXT PRIMARY KEY,
        owner TEXT NOT NULL,
        expires_at REAL NOT NULL
    ) WITHOUT ROWID;
    """,
)
"""Step N brings the schema from version N to N+1. Never edited once released, only added to."""


class Database:
    """The writer is shared by a lock, so a transaction never mixes with another; reads do not wait for it.

    WAL with synchronous=NORMAL: a commit survives a killed process (DESIGN 3). The file holds configurations with
    credentials and is readable by its owner only.
    """

    def __init__(self, writer: aiosqlite.Connection, reader: aiosqlite.Connection) -> None:
        self._writer = writer
        self._reader = reader
        self._write_lock = asyncio.Lock()

    @classmethod
    async def open(cls, path: Path) -> Database:
        """Opens or creates, and migrates. `UnavailableError` if a newer server has written the file."""
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        writer = await _connect(path)
        try:
            await _migrate(writer, path)
            reader = await _connect(path)
        except BaseException:
            await writer.close()
            raise
        return cls(writer, reader)

    async def close(self) -> None:
        async with self._write_lock:
            await self._writer.close()
        await self._reader.close()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[aiosqlite.Connection]:
        """A write transaction: committed at the end, rolled back on any exception."""
        async with self._write_lock:
            await self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
            except BaseException:
                await self._writer.execute("ROLLBACK")
                raise
            await self._writer.execute("COMMIT")

    async def execute(self, statement: str, parameters: tuple[object, ...]) -> int:
        """One statement that is a transaction of its own; the number of rows it changed. Two trips to the writer's
        thread fewer than `transaction`."""
        async with self._write_lock:
            return (await self._writer.execute(statement, parameters)).rowcount

    async def fetch(self, query: str, parameters: tuple[object, ...] = ()) -> list[aiosqlite.Row]:
        """All rows of a query outside any transaction."""
        return list(await self._reader.execute_fetchall(query, parameters))


async def _connect(path: Path) -> aiosqlite.Connection:
    connection = await aiosqlite.connect(path, isolation_level=None)
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=10000"):
        await connection.execute(f"PRAGMA {pragma}")
    return connection


async def _migrate(connection: aiosqlite.Connection, path: Path) -> None:
    row = await (await connection.execute("PRAGMA user_version")).fetchone()
    version = int(row[0]) if row else 0
    if version > len(MIGRATIONS):
        raise UnavailableError(f"{path} was written by a newer hiver (schema {version}); start that version instead")
    for number in range(version, len(MIGRATIONS)):
        script = f"BEGIN IMMEDIATE; {MIGRATIONS[number]} PRAGMA user_version={number + 1}; COMMIT;"
        await connection.executescript(script)
