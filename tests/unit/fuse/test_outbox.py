"""Between the threads that serve the kernel and the server that reads."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Self

import pytest

from hiverd.fuse import outbox as module
from hiverd.fuse.frames import Access, Accessed, Lost, Said, Told, read_frame, told_of
from hiverd.fuse.outbox import Outbox


def access(number: int) -> Access:
    return Access(True, "write", f"/{number}")


class Peer:
    """The other end of a connection to an outbox."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.StreamReader | None = None
        self._connected = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._accept, path=str(self.path))
        self._reader, self._own = await asyncio.open_unix_connection(str(self.path))
        await self._connected.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._own.close()
        assert self.writer is not None
        self.writer.close()
        self._server.close()

    async def _accept(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self._connected.set()

    async def read(self) -> Told:
        assert self._reader is not None
        content = await asyncio.wait_for(read_frame(self._reader), 10)
        assert content is not None
        return told_of(content)

    async def paths(self, count: int) -> list[str]:
        """Of the next so many accesses."""
        found: list[str] = []
        while len(found) < count:
            message = await self.read()
            assert isinstance(message, Accessed)
            found += [item.path for item in message.accesses]
        return found


async def test_accesses_of_threads_arrive_in_order_and_in_batches(tmp_path):
    outbox = Outbox(asyncio.get_running_loop())
    async with Peer(tmp_path / "s") as peer:
        outbox.attach(peer.writer)
        thread = threading.Thread(target=lambda: [outbox.record(access(n)) for n in range(5000)])
        thread.start()
        assert await peer.paths(5000) == [f"/{n}" for n in range(5000)]
        thread.join()


async def test_what_happens_while_nobody_is_there_is_kept_and_the_rest_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_WAITING", 10)
    monkeypatch.setattr(module, "MAX_KEPT", 50)
    outbox = Outbox(asyncio.get_running_loop())
    for number in range(60):
        outbox.record(access(number))
    async with Peer(tmp_path / "s") as peer:
        outbox.attach(peer.writer)
        assert await peer.read() == Lost(10)
        assert await peer.paths(50) == [f"/{n}" for n in range(50)]


async def test_a_server_that_does_not_read_makes_the_agent_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_WAITING", 100)
    outbox = Outbox(asyncio.get_running_loop())
    long = "x" * 5000
    recorded = 0
    done = threading.Event()

    def work() -> None:
        nonlocal recorded
        for _ in range(3000):
            outbox.record(Access(True, "read", long))
            recorded += 1
        done.set()

    async with Peer(tmp_path / "s") as peer:
        outbox.attach(peer.writer)
        thread = threading.Thread(target=work)
        thread.start()
        before = -1
        while before != recorded:  # until it does not move any more
            before = recorded
            await asyncio.sleep(0.2)
        assert not done.is_set()
        assert len(await peer.paths(3000)) == 3000
        thread.join()


async def test_a_lost_server_lets_the_agent_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_WAITING", 1)
    outbox = Outbox(asyncio.get_running_loop())
    async with Peer(tmp_path / "s") as peer:
        outbox.attach(peer.writer)
        outbox.detach(peer.writer)
        await asyncio.wait_for(asyncio.to_thread(lambda: [outbox.record(access(n)) for n in range(100)]), 5)
        outbox.attach(peer.writer)
        assert len(await peer.paths(100)) == 100


async def test_flush_waits_until_all_is_sent(tmp_path):
    outbox = Outbox(asyncio.get_running_loop())
    async with Peer(tmp_path / "s") as peer:
        outbox.attach(peer.writer)
        outbox.tell(Said(30, "a line"))
        outbox.record(access(1))
        await asyncio.wait_for(outbox.flush(), 5)
        assert await peer.read() == Said(30, "a line")
        assert await peer.paths(1) == ["/1"]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(module, "GATHER_SECONDS", 0.001)


async def test_what_a_server_took_and_did_not_record_is_told_to_the_next(tmp_path):
    outbox = Outbox(asyncio.get_running_loop())
    async with Peer(tmp_path / "s") as peer:
        outbox.attach(peer.writer)
        for number in range(10):
            outbox.record(access(number))
        await peer.paths(10)
        outbox.confirmed(peer.writer, 4)
        outbox.confirmed(peer.writer, 7)
        outbox.record(access(10))
        await peer.paths(1)
        outbox.detach(peer.writer)
        outbox.record(access(11))
        outbox.attach(peer.writer)
        assert await peer.paths(5) == ["/7", "/8", "/9", "/10", "/11"]


async def test_messages_that_nobody_hears_are_bounded_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_OTHERS", 5)
    outbox = Outbox(asyncio.get_running_loop())
    for number in range(8):
        outbox.tell(Said(30, str(number)))
    async with Peer(tmp_path / "s") as peer:
        outbox.attach(peer.writer)
        assert await peer.read() == Lost(0, 3)
        assert [(await peer.read()).text for _ in range(5)] == ["3", "4", "5", "6", "7"]
