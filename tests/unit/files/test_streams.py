"""Downloads and uploads over a real socket: what is promised, what happens when somebody leaves."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from hiverd.files.access import FileAccess
from hiverd.wire.events import FsResponseEvent
from support.plain import plain_client
from unit.files.rig import FolderSandbox, eventually, serving

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="changes to other users' ids")

MIB = 1 << 20


def open_files(below: Path) -> list[str]:
    """Paths below a folder that this process has open, deleted ones included."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        if target.startswith(str(below)):
            found.append(target)
    return found


@pytest.fixture
def sandbox(tmp_path: Path) -> FolderSandbox:
    (tmp_path / "root/workspace").mkdir(parents=True)
    return FolderSandbox(tmp_path / "root", (1234, 1234), [("/workspace", "local")])


@pytest.fixture
async def client(sandbox: FolderSandbox) -> AsyncIterator[httpx.AsyncClient]:
    files = FileAccess()
    async with serving(sandbox, files) as base_url, plain_client(base_url=base_url, timeout=10) as client:
        yield client
        await eventually(lambda: not open_files(sandbox.root))
        sandbox.recorded.events.clear()
    files.close()


def last_error(sandbox: FolderSandbox) -> str | None:
    event = sandbox.recorded.events[-1]
    assert isinstance(event, FsResponseEvent)
    return event.error


async def test_a_file_that_gets_shorter_cuts_the_connection(client: httpx.AsyncClient, sandbox: FolderSandbox) -> None:
    path = sandbox.root / "workspace/f"
    path.write_bytes(bytes(64 * MIB))
    received = 0
    with pytest.raises(httpx.RemoteProtocolError):  # noqa: PT012 -- it comes while reading
        async with client.stream("GET", "/file/workspace/f") as answer:
            assert answer.headers["content-length"] == str(64 * MIB)
            async for data in answer.aiter_bytes():
                received += len(data)
                os.truncate(path, MIB)
    assert received < 64 * MIB
    assert last_error(sandbox) == "the file was cut short while it was read"
    assert (await client.get("/file/workspace/f")).content == bytes(MIB)


async def test_a_file_that_grows_is_sent_as_long_as_it_was(client: httpx.AsyncClient, sandbox: FolderSandbox) -> None:
    path = sandbox.root / "workspace/f"
    path.write_bytes(bytes(8 * MIB))
    received = 0
    async with client.stream("GET", "/file/workspace/f?offset=5") as answer:
        async for data in answer.aiter_bytes():
            received += len(data)
            with path.open("ab") as file:
                file.write(b"more")
    assert received == 8 * MIB - 5
    assert last_error(sandbox) is None


async def test_a_reader_that_leaves_ends_the_reading(client: httpx.AsyncClient, sandbox: FolderSandbox) -> None:
    with (sandbox.root / "workspace/f").open("wb") as file:
        file.truncate(1 << 40)
    async with client.stream("GET", "/file/workspace/f") as answer:
        await anext(answer.aiter_bytes())
    await eventually(lambda: isinstance(sandbox.recorded.events[-1], FsResponseEvent))
    assert last_error(sandbox) == "the client left"
    await eventually(lambda: not open_files(sandbox.root))


async def test_readers_that_stall_hold_nobody_up(client: httpx.AsyncClient, sandbox: FolderSandbox) -> None:
    """More of them than there are threads for this sandbox, or for all of them."""
    with (sandbox.root / "workspace/f").open("wb") as file:
        file.truncate(1 << 34)
    port = client.base_url.port
    stalled = []
    try:
        for _ in range(80):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 10)
            stalled.append(writer)
            writer.write(b"GET /sandbox/the-id/v1/key/file/workspace/f HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        async with asyncio.timeout(2):
            assert (await client.post("/file/workspace/g", content=b"hello")).status_code == 200
            assert (await client.get("/file/workspace/g")).content == b"hello"
    finally:
        for writer in stalled:
            writer.close()
            await writer.wait_closed()


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("size", [10, 5 * MIB])
async def test_an_upload_that_breaks_off_leaves_nothing(
    client: httpx.AsyncClient, sandbox: FolderSandbox, size: int, existing: bool
) -> None:
    if existing:
        (sandbox.root / "workspace/f").write_text("old")
    port = client.base_url.port
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /sandbox/the-id/v1/key/file/workspace/f HTTP/1.1\r\nHost: x\r\nContent-Length: {2 * size}\r\n\r\n"
    writer.write(head.encode() + bytes(size))
    await writer.drain()
    await eventually(lambda: bool(open_files(sandbox.root)))
    assert os.listdir(sandbox.root / "workspace") == (["f"] if existing else [])
    writer.close()
    await eventually(lambda: not open_files(sandbox.root))
    assert os.listdir(sandbox.root / "workspace") == (["f"] if existing else [])
    if existing:
        assert (sandbox.root / "workspace/f").read_text() == "old"
    assert last_error(sandbox) == "the upload was cut short"


async def test_an_upload_is_invisible_until_it_is_whole(client: httpx.AsyncClient, sandbox: FolderSandbox) -> None:
    seen = []

    async def content() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield bytes(MIB)
            await eventually(lambda: bool(open_files(sandbox.root)))
            seen.append(os.listdir(sandbox.root / "workspace"))

    assert (await client.post("/file/workspace/f", content=content())).json()["bytes"] == 5 * MIB
    assert seen == [[]] * 5
    assert (sandbox.root / "workspace/f").stat().st_size == 5 * MIB


async def test_many_tiny_chunks(client: httpx.AsyncClient, sandbox: FolderSandbox) -> None:
    async def content() -> AsyncIterator[bytes]:
        for number in range(5000):
            yield b"%d," % number

    assert (await client.post("/file/workspace/f", content=content())).status_code == 200
    assert (sandbox.root / "workspace/f").read_text() == "".join(f"{number}," for number in range(5000))


async def test_transfers_keep_the_sandbox_alive(client: httpx.AsyncClient, sandbox: FolderSandbox) -> None:
    await client.post("/file/workspace/f", content=bytes(4 * MIB))
    after_upload = sandbox.touched
    assert after_upload >= 4
    await client.get("/file/workspace/f")
    assert sandbox.touched >= after_upload + 4


async def test_parallel_writers_of_one_file(client: httpx.AsyncClient, sandbox: FolderSandbox) -> None:
    contents = [bytes([number]) * MIB for number in range(20)]
    answers = await asyncio.gather(*(client.post("/file/workspace/f", content=data) for data in contents))
    assert {answer.status_code for answer in answers} == {200}
    assert (sandbox.root / "workspace/f").read_bytes() in contents
    assert os.listdir(sandbox.root / "workspace") == ["f"]
