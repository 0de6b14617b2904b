"""The journal: order, durability before visibility, trimming, slow readers."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import asynccontextmanager

import pytest

from hiverd.clock import SystemClock
from hiverd.contracts.errors import UnavailableError
from hiverd.state.database import MIGRATIONS, Database
from hiverd.state.journal import Journal, encode_event
from hiverd.state.records import Records, SandboxRecord
from hiverd.wire.events import ExecRequestEvent, ResourceUsageEvent, StdioEvent


def record(sandbox_id: str = "s", slot: int = 0) -> SandboxRecord:
    return SandboxRecord(
        id=sandbox_id,
        key=f"key-{sandbox_id}",
        slot=slot,
        status="starting",
        backend="fake",
        config=b"{}",
        created_at=1.0,
        last_activity_at=1.0,
    )


@asynccontextmanager
async def opened(path, *, max_count=500, max_bytes=1 << 20):
    database = await Database.open(path / "test.sqlite3")
    journal = Journal(database, SystemClock(), max_count=max_count, max_bytes=max_bytes)
    await journal.start()
    try:
        yield database, journal
    finally:
        await journal.close()
        await database.close()


async def everything(events, position=0):
    found = []
    while page := await events.read_after(position):
        found += page
        position = page[-1][0]
    return found


async def test_ids_are_given_at_once_and_read_in_order(tmp_path):
    async with opened(tmp_path) as (database, journal):
        await Records(database).insert(record())
        events = journal.open("s", last_id=0, types=None)
        ids = [events.emit(StdioEvent(stdout=f"{n}\n")) for n in range(300)]
        assert ids == list(range(1, 301))
        await events.flushed()
        found = await everything(events)
        assert [event_id for event_id, _ in found] == ids
        assert [json.loads(body)["stdout"] for _, body in found] == [f"{n}\n" for n in range(300)]
        assert all(json.loads(body)["id"] == event_id for event_id, body in found)


async def test_nothing_is_seen_before_it_is_stored(tmp_path):
    async with opened(tmp_path) as (database, journal):
        await Records(database).insert(record())
        events = journal.open("s", last_id=0, types=None)
        async with database._write_lock:
            event_id = events.emit(StdioEvent(stdout="x"))
            assert not await events.wait_beyond(event_id - 1, 0.1)
        assert await events.wait_beyond(event_id - 1, 5)
        other = sqlite3.connect(tmp_path / "test.sqlite3")
        assert other.execute("SELECT count(*) FROM events").fetchone() == (1,)
        other.close()


async def test_filtered_types_consume_ids_and_are_not_stored(tmp_path):
    async with opened(tmp_path) as (database, journal):
        await Records(database).insert(record())
        events = journal.open("s", last_id=0, types=frozenset({"stdio"}))
        events.emit(ExecRequestEvent(cwd="/", command="x"))
        assert not events.wants(ExecRequestEvent)
        assert events.emit(StdioEvent(stdout="x")) == 2
        await events.flushed()
        assert [event_id for event_id, _ in await everything(events)] == [2]


async def test_signs_of_life(tmp_path):
    async with opened(tmp_path) as (_, journal):
        events = journal.open("s", last_id=0, types=frozenset())
        signs = []
        events.on_activity = lambda: signs.append(1)
        events.emit(ResourceUsageEvent(cpu_percent=1, memory_bytes=1))
        assert signs == []
        events.emit(StdioEvent(stdout="x"))
        assert signs == [1]


async def test_a_restart_goes_on_behind_what_was_stored(tmp_path):
    async with opened(tmp_path) as (database, journal):
        await Records(database).insert(record())
        events = journal.open("s", last_id=0, types=None)
        events.emit(StdioEvent(stdout="x"))
        events.set_log_position("17")
        await events.flushed()
    async with opened(tmp_path) as (database, journal):
        (stored,) = await Records(database).load()
        assert (stored.last_event_id, stored.log_position) == (1, "17")
        events = journal.open("s", last_id=stored.last_event_id, types=None)
        assert events.emit(StdioEvent(stdout="y")) == 2


@pytest.mark.parametrize(("max_count", "max_bytes"), [(500, 1 << 30), (1 << 30, 100_000)])
async def test_the_oldest_go_first(tmp_path, max_count, max_bytes):
    async with opened(tmp_path, max_count=max_count, max_bytes=max_bytes) as (database, journal):
        await Records(database).insert(record())
        events = journal.open("s", last_id=0, types=None)
        for _ in range(40):
            for _ in range(50):
                events.emit(StdioEvent(stdout="x" * 100))
            await events.flushed()
        await journal.close()  # trims what is still to be trimmed
        rows = await database.fetch("SELECT id, length(body) FROM events ORDER BY id")
        assert len(rows) <= max_count + 256 + 50
        assert sum(row[1] for row in rows) <= max_bytes + 50 * 300
        assert [row[0] for row in rows] == list(range(rows[0][0], 2001))
        found = await everything(events)
        assert found[0][0] == rows[0][0]  # a resume from a trimmed position starts with the oldest kept


async def test_what_an_earlier_server_left_is_counted(tmp_path):
    """However often servers start anew, no more is kept than the slack allows."""
    async with opened(tmp_path, max_count=500) as (database, journal):
        await Records(database).insert(record())
        events = journal.open("s", last_id=0, types=None)
        for n in range(700):
            events.emit(StdioEvent(stdout=f"{n}\n"))
    async with opened(tmp_path, max_count=500) as (database, journal):
        events = journal.open("s", last_id=700, types=None)
        events.emit(StdioEvent(stdout="one more\n"))
        await journal.close()
        assert [row[0] for row in await database.fetch("SELECT id FROM events ORDER BY id")] == list(range(202, 702))


async def test_a_closed_stream_tells_its_readers(tmp_path):
    async with opened(tmp_path) as (database, journal):
        await Records(database).insert(record())
        events = journal.open("s", last_id=0, types=None)
        waiting = asyncio.ensure_future(events.wait_beyond(0, 30))
        await asyncio.sleep(0)
        events.close()
        assert await asyncio.wait_for(waiting, 5) is False
        with events.reader():
            began = asyncio.get_running_loop().time()
            await events.drained(0.1)
            assert asyncio.get_running_loop().time() - began >= 0.09
        await asyncio.wait_for(events.drained(30), 5)


async def test_a_failing_disk_loses_nothing(tmp_path, monkeypatch):
    async with opened(tmp_path) as (database, journal):
        await Records(database).insert(record())
        events = journal.open("s", last_id=0, types=None)
        real = database.transaction
        failures = [OSError(28, "No space left on device")]

        def sometimes():
            if failures:
                raise failures.pop()
            return real()

        monkeypatch.setattr(database, "transaction", sometimes)
        events.emit(StdioEvent(stdout="first"))
        await asyncio.sleep(0.1)
        events.emit(StdioEvent(stdout="second"))
        await asyncio.wait_for(events.flushed(), 10)
        assert [event_id for event_id, _ in await everything(events)] == [1, 2]


async def test_a_producer_waits_when_too_much_is_queued(tmp_path):
    async with opened(tmp_path, max_bytes=1 << 30) as (database, journal):
        await Records(database).insert(record())
        events = journal.open("s", last_id=0, types=None)
        async with database._write_lock:
            await asyncio.sleep(0)
            for _ in range(10):
                events.emit(StdioEvent(stdout="x" * (1 << 20)))
                await asyncio.sleep(0)
            for _ in range(10):
                events.emit(StdioEvent(stdout="x" * (1 << 20)))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(journal.room(), 0.1)
        await asyncio.wait_for(journal.room(), 10)


def test_events_are_ascii_lines():
    line = encode_event(StdioEvent(stdout="smörgås \u2028\n"), 7, 0.0)
    assert line.isascii()
    assert b"\n" not in line
    assert json.loads(line) == {
        "id": 7,
        "timestamp": "1970-01-01T00:00:00.000000Z",
        "type": "stdio",
        "stdout": "smörgås \u2028\n",
    }


async def test_a_newer_database_is_refused(tmp_path):
    database = await Database.open(tmp_path / "test.sqlite3")
    async with database.transaction() as connection:
        await connection.execute(f"PRAGMA user_version={len(MIGRATIONS) + 1}")
    await database.close()
    with pytest.raises(UnavailableError, match="newer hiver"):
        await Database.open(tmp_path / "test.sqlite3")


async def test_the_database_is_its_owners_only(tmp_path):
    database = await Database.open(tmp_path / "test.sqlite3")
    await database.close()
    assert (tmp_path / "test.sqlite3").stat().st_mode & 0o077 == 0
