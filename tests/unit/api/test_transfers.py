"""Large bodies that go past the HTTP server: what comes before, between and after them is HTTP as ever."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

import pytest

from hiverd.api import transfers
from hiverd.api.transfers import WORTHWHILE_BYTES
from hiverd.files import direct

BEYOND_BUFFERS = 32 << 20
"""More than sockets hold: who does not read stops who sends."""
SIZE = 3 * WORTHWHILE_BYTES + 4321


class Wire:
    """One connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    @asynccontextmanager
    async def to(cls, server: Any) -> AsyncIterator[Self]:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.base_url.rsplit(":", 1)[1]))
        try:
            yield cls(reader, writer)
        finally:
            writer.close()

    def send(self, method: str, path: str, body: bytes = b"", **fields: str) -> None:
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
        length = (
            "" if "Transfer_Encoding" in fields or "Content_Length" in fields else f"Content-Length: {len(body)}\r\n"
        )
        self.writer.write(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{lines}{length}\r\n".encode() + body)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        async with asyncio.timeout(20):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            fields = dict(line.lower().split(": ", 1) for line in head[1:-2])
            body = await self.reader.readexactly(int(fields.get("content-length", 0)))
        return int(head[0].split()[1]), fields, body


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which bodies were taken over: without this, all tests here could pass on the ordinary way."""
    seen: list[str] = []
    for kind in (direct.Incoming, direct.Outgoing):

        def init(self: Any, *arguments: Any, kind: Any = kind, original: Any = kind.__init__) -> None:
            seen.append(kind.__name__)
            original(self, *arguments)

        monkeypatch.setattr(kind, "__init__", init)
    return seen


async def until_taken(taken: list[str], kind: str, count: int = 1) -> None:
    async with asyncio.timeout(10):
        while taken.count(kind) < count:
            await asyncio.sleep(0.01)


async def test_requests_that_come_early_are_answered_in_order(server, taken):
    base = await server.create("k")
    data = os.urandom(SIZE)
    async with Wire.to(server) as wire:
        wire.send("POST", f"{base}/file/big", data)
        assert (await wire.answer())[0] == 200
        for _ in range(3):
            wire.send("GET", f"{base}/file/big")
            wire.send("GET", f"{base}/ping")
            wire.send("GET", f"{base}/file/big")
        for _ in range(3):
            assert (await wire.answer())[2] == data
            assert (await wire.answer())[0] == 200
            assert (await wire.answer())[2] == data
    assert taken.count("Outgoing") == 6


async def test_one_connection_carries_everything(server, taken):
    base = await server.create("k")
    data = os.urandom(SIZE)
    async with Wire.to(server) as wire:
        for number in range(3):
            wire.send("POST", f"{base}/file/big{number}", data)
            status, _, body = await wire.answer()
            assert (status, f'"bytes":{SIZE}' in body.decode()) == (200, True)
            wire.send("GET", f"{base}/file/big{number}")
            assert (await wire.answer())[2] == data
            wire.send("GET", f"{base}/file/big{number}?offset={SIZE - 2 * WORTHWHILE_BYTES}")
            assert (await wire.answer())[2] == data[-2 * WORTHWHILE_BYTES :]
            wire.send("GET", f"{base}/ping")
            assert (await wire.answer())[0] == 200
    assert taken == ["Incoming", "Outgoing", "Outgoing"] * 3


async def test_what_is_pipelined_behind_a_body_is_the_next_request(server, taken):
    base = await server.create("k")
    data = os.urandom(SIZE)
    async with Wire.to(server) as wire:
        wire.send("POST", f"{base}/file/a", data)
        wire.send("POST", f"{base}/file/b", data[::-1])
        wire.send("GET", f"{base}/file/a")
        wire.send("GET", f"{base}/file/b")
        assert (await wire.answer())[0] == 200
        assert (await wire.answer())[0] == 200
        assert (await wire.answer())[2] == data
        assert (await wire.answer())[2] == data[::-1]
    assert "Incoming" in taken
    assert "Outgoing" in taken


async def test_a_client_that_waits_for_consent_gets_it(server, taken):
    base = await server.create("k")
    data = os.urandom(SIZE)
    async with Wire.to(server) as wire:
        wire.send("POST", f"{base}/file/a", Content_Length=str(SIZE), Expect="100-continue")
        assert await wire.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        wire.writer.write(data)
        assert (await wire.answer())[0] == 200
    assert (await server.client.get(f"{base}/file/a")).content == data
    assert taken[0] == "Incoming"


@pytest.mark.parametrize(
    ("method", "fields"),
    [("POST", {"Transfer_Encoding": "chunked"}), ("POST", {"Content_Length": str(WORTHWHILE_BYTES - 1)})],
)
async def test_other_bodies_go_the_ordinary_way(server, taken, method, fields):
    base = await server.create("k")
    data = os.urandom(WORTHWHILE_BYTES - 1)
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data) if "Transfer_Encoding" in fields else data
    async with Wire.to(server) as wire:
        wire.send(method, f"{base}/file/a", body, **fields)
        assert (await wire.answer())[0] == 200
        wire.send("GET", f"{base}/file/a")
        assert (await wire.answer())[2] == data
    assert taken == []


async def test_a_refused_upload_is_skipped_and_the_connection_goes_on(server, taken):
    base = await server.create("k")
    await server.client.post(f"{base}/file/folder/x", content=b"x")
    async with Wire.to(server) as wire:
        wire.send("POST", f"{base}/file/folder", os.urandom(SIZE))
        wire.send("GET", f"{base}/ping")
        status, _, body = await wire.answer()
        assert status == 400, body
        assert (await wire.answer())[0] == 200
    assert taken == ["Incoming"]


async def test_a_full_disk_in_mid_body_is_told_and_the_rest_skipped(server, taken, monkeypatch):
    base = await server.create("k")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(direct, "_drain", full)
    async with Wire.to(server) as wire:
        wire.send("POST", f"{base}/file/a", os.urandom(SIZE))
        wire.send("GET", f"{base}/ping")
        assert (await wire.answer())[0] == 507
        assert (await wire.answer())[0] == 200
    assert (await server.client.get(f"{base}/file/a")).status_code == 404
    assert taken == ["Incoming"]


async def test_a_cut_upload_leaves_nothing(server, taken):
    base = await server.create("k")
    async with Wire.to(server) as wire:
        wire.send("POST", f"{base}/file/a", os.urandom(SIZE), Content_Length=str(2 * SIZE))
        await until_taken(taken, "Incoming")
    listing = (await server.client.get(f"{base}/directories?path=/")).json()["entries"]
    assert "a" not in {entry["name"] for entry in listing}
    assert (await server.client.get(f"{base}/file/a")).status_code == 404


async def test_slow_peers_hold_no_thread(server, taken):
    """Many more than the sandbox has threads, each in mid-body; another call is answered at once."""
    base = await server.create("k")
    data = os.urandom(BEYOND_BUFFERS)
    await server.client.post(f"{base}/file/big", content=data)
    async with (
        Wire.to(server) as a,
        Wire.to(server) as b,
        Wire.to(server) as c,
        Wire.to(server) as d,
        Wire.to(server) as e,
        Wire.to(server) as f,
    ):
        for number, wire in enumerate((a, b, c)):
            wire.send("POST", f"{base}/file/slow{number}", data[:1000], Content_Length=str(len(data)))
        for wire in (d, e, f):
            wire.writer.transport.pause_reading()
            wire.send("GET", f"{base}/file/big")
        await until_taken(taken, "Incoming", 4)
        await until_taken(taken, "Outgoing", 3)
        for _ in range(8):
            assert (await server.client.get(f"{base}/directories?path=/")).status_code == 200
        for wire in (a, b, c):
            wire.writer.write(data[1000:])
            assert (await wire.answer())[0] == 200
        for wire in (d, e, f):
            wire.writer.transport.resume_reading()
            assert (await wire.answer())[2] == data


async def test_a_file_that_shrinks_makes_the_answer_incomplete(server, taken):
    base = await server.create("k")
    size = BEYOND_BUFFERS
    await server.client.post(f"{base}/file/big", content=os.urandom(size))
    path = next(server.services.settings.server.data_dir.rglob("fake-root/big"))
    async with Wire.to(server) as wire:
        wire.writer.transport.pause_reading()
        wire.send("GET", f"{base}/file/big")
        await until_taken(taken, "Outgoing")
        os.truncate(path, 1000)
        wire.writer.transport.resume_reading()
        head = await wire.reader.readuntil(b"\r\n\r\n")
        assert f"content-length: {size}".encode() in head
        assert len(await asyncio.wait_for(wire.reader.read(), 20)) < size


async def test_reading_behind_the_back_of_a_takeover_ends_the_connection(server, taken, monkeypatch):
    """The fuse: should anything of uvicorn resume the reading, no byte of a body is ever read as a request."""
    base = await server.create("k")
    taking = transfers.DirectProtocol.take_body

    def take_and_resume(self: Any, cycle: Any, length: int) -> Any:
        incoming = taking(self, cycle, length)
        if incoming is not None:
            self.flow.resume_reading()
        return incoming

    async def late(self: Any, original: Any = direct.Channel.readable) -> None:
        await asyncio.sleep(0.2)  # so that it is the server's own reading that sees the bytes
        await original(self)

    monkeypatch.setattr(transfers.DirectProtocol, "take_body", take_and_resume)
    monkeypatch.setattr(direct.Channel, "readable", late)
    async with Wire.to(server) as wire:
        wire.send("POST", f"{base}/file/a", b"x", Content_Length=str(SIZE))
        await until_taken(taken, "Incoming")
        wire.writer.write(b"DELETE / HTTP/1.1\r\n\r\n")
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await wire.answer()
