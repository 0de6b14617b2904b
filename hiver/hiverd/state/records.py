"""The stored record of a sandbox. What is written here before a side effect is what a restart cleans up after it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from msgspec import Struct

from hiverd.contracts.isolation import WorkloadSpec
from hiverd.state.database import Database

Status = Literal["starting", "running", "stopping"]


class SandboxRecord(Struct, kw_only=True):
    id: str
    key: str
    slot: int
    status: Status
    backend: str
    config: bytes
    """The SandboxConfig as JSON, secrets included."""
    spec: WorkloadSpec | None = None
    state: dict[str, Any] | None = None
    """The isolation plug-in's own document."""
    created_at: float
    last_activity_at: float
    """Both in seconds since the epoch, so that a TTL counts on over a restart."""
    last_event_id: int = 0
    log_position: str | None = None


def _encode_spec(spec: WorkloadSpec) -> bytes:
    return msgspec.json.encode(spec, enc_hook=os.fspath)


def _decode_spec(raw: bytes) -> WorkloadSpec:
    return msgspec.json.decode(raw, type=WorkloadSpec, dec_hook=lambda kind, value: kind(value))


class Records:
    """Sandbox records in the database. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self) -> list[SandboxRecord]:
        """All records, with `last_event_id` never below what the journal holds."""
        rows = await self._database.fetch(
            "SELECT id, key, slot, status, backend, config, spec, state, created_at, last_activity_at,"
            " max(last_event_id, coalesce((SELECT max(e.id) FROM events e WHERE e.sandbox_id = s.id), 0)),"
            " log_position FROM sandboxes s"
        )
        return [
            SandboxRecord(
                id=row[0],
                key=row[1],
                slot=row[2],
                status=row[3],
                backend=row[4],
                config=bytes(row[5]),
                spec=_decode_spec(row[6]) if row[6] is not None else None,
                state=json.loads(row[7]) if row[7] is not None else None,
                created_at=row[8],
                last_activity_at=row[9],
                last_event_id=row[10],
                log_position=row[11],
            )
            for row in rows
        ]

    async def insert(self, record: SandboxRecord) -> None:
        await self._database.execute(
            "INSERT INTO sandboxes (id, key, slot, status, backend, config, created_at, last_activity_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                record.id,
                record.key,
                record.slot,
                record.status,
                record.backend,
                record.config,
                record.created_at,
                record.last_activity_at,
            ),
        )

    async def set_running(self, sandbox_id: str, spec: WorkloadSpec, state: Mapping[str, Any]) -> None:
        await self._database.execute(
            "UPDATE sandboxes SET status = 'running', spec = ?, state = ? WHERE id = ?",
            (_encode_spec(spec), msgspec.json.encode(state), sandbox_id),
        )

    async def set_stopping(self, sandbox_id: str) -> None:
        await self._database.execute("UPDATE sandboxes SET status = 'stopping' WHERE id = ?", (sandbox_id,))

    async def set_captured(self, sandbox_id: str) -> None:
        """What a removed sandbox leaves is safe. From here on its files may be half gone: nobody captures them again. A
        removed sandbox without a spec is one of which nothing is to be kept."""
        await self._database.execute(
            "UPDATE sandboxes SET spec = NULL WHERE id = ? AND status = 'stopping'", (sandbox_id,)
        )

    async def set_spec(self, sandbox_id: str, spec: WorkloadSpec) -> None:
        """Notes what a change is about to touch, before it does."""
        await self._database.execute("UPDATE sandboxes SET spec = ? WHERE id = ?", (_encode_spec(spec), sandbox_id))

    async def set_config(self, sandbox_id: str, config: bytes, spec: WorkloadSpec) -> None:
        """Commits an applied configuration."""
        await self._database.execute(
            "UPDATE sandboxes SET config = ?, spec = ? WHERE id = ?",
            (config, _encode_spec(spec), sandbox_id),
        )

    async def set_activity(self, last_activity_at: Mapping[str, float]) -> None:
        async with self._database.transaction() as connection:
            await connection.executemany(
                "UPDATE sandboxes SET last_activity_at = ? WHERE id = ?",
                [(at, sandbox_id) for sandbox_id, at in last_activity_at.items()],
            )

    async def delete(self, sandbox_id: str) -> None:
        """Removes the record and its events. Only once nothing of the sandbox is left on the host."""
        async with self._database.transaction() as connection:
            await connection.execute("DELETE FROM events WHERE sandbox_id = ?", (sandbox_id,))
            await connection.execute("DELETE FROM sandboxes WHERE id = ?", (sandbox_id,))

    async def take_lease(self, name: str, owner: str, now: float, seconds: float) -> bool:
        """Takes or renews a lease; False while another owner holds it."""
        changed = await self._database.execute(
            "INSERT INTO leases (name, owner, expires_at) VALUES (?, ?, ?)"
            " ON CONFLICT (name) DO UPDATE SET owner = excluded.owner, expires_at = excluded.expires_at"
            " WHERE owner = excluded.owner OR expires_at <= ?",
            (name, owner, now + seconds, now),
        )
        return changed > 0

    async def drop_lease(self, name: str, owner: str) -> None:
        await self._database.execute("DELETE FROM leases WHERE name = ? AND owner = ?", (name, owner))
