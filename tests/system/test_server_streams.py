"""Large outputs and files: the server's memory stays flat, a slow reader slows the producer (issue: must hold)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from support.leaks import marks_of, wait_until_clean
from support.memory import GROWTH_BYTES, MIB, Peak
from support.plain import plain_client
from support.server import Backend, Server

pytestmark = [pytest.mark.system, pytest.mark.slow]

OUTPUT_MIB = int(os.environ.get("HIVER_TEST_OUTPUT_MIB", "1024"))
FILE_MIB = int(os.environ.get("HIVER_TEST_FILE_MIB", "1024"))


@pytest.fixture
async def sandbox(tmp_path: Path, isolated_by: Backend) -> AsyncIterator[tuple[Server, httpx.AsyncClient, str]]:
    server = Server(tmp_path, backend=isolated_by)
    marks = marks_of(server.data_dir)
    server.start()
    async with plain_client(base_url=server.url, timeout=600) as client:
        answer = await client.post("/v1/sandboxes/k", json={})
        yield server, client, f"/sandbox/{answer.json()['id']}/v1/k"
    assert server.stop() == 0
    wait_until_clean(marks)


async def test_endless_output(sandbox) -> None:
    server, client, base = sandbox
    command = f"head -c {OUTPUT_MIB * MIB} /dev/zero | tr '\\0' 'a'"
    received = 0
    async with (
        Peak(server) as peak,
        client.stream("POST", f"{base}/exec-stream/x", json={"command": command}) as answer,
    ):
        last = b""
        async for piece in answer.aiter_raw(MIB):
            received += piece.count(b"a")
            last = (last + piece)[-200:]
    assert received >= OUTPUT_MIB * MIB
    assert b'"code":0' in last
    assert peak.growth < GROWTH_BYTES


async def test_a_slow_reader_slows_the_producer(sandbox) -> None:
    server, client, base = sandbox
    endless = "import os; n=0\nwhile True:\n n+=os.write(1,b'x'*65536)\n open('/tmp/n','w').write(str(n))"
    command = ["python3", "-uc", endless]
    async with (
        Peak(server) as peak,
        client.stream("POST", f"{base}/exec-stream/x", json={"command": command}) as answer,
    ):
        pieces = answer.aiter_raw()
        await anext(pieces)

        async def produced() -> int:
            return int((await client.get(f"{base}/file/tmp/n")).text or 0)

        settled, steady = 0, 0
        while steady < 3:  # read no more; the producer must come to a halt
            await asyncio.sleep(0.3)
            now = await produced()
            steady = steady + 1 if now == settled else 0
            settled = now
            assert now < 64 * MIB
        for _ in range(200):
            await anext(pieces)
        await asyncio.sleep(0.3)
        assert await produced() > settled
    assert peak.growth < GROWTH_BYTES


async def test_large_files(sandbox) -> None:
    server, client, base = sandbox
    block = os.urandom(MIB)

    async def content() -> AsyncIterator[bytes]:
        for _ in range(FILE_MIB):
            yield block

    async with Peak(server) as peak:
        written = await client.post(f"{base}/file/workspace/big", content=content())
        assert written.json()["bytes"] == FILE_MIB * MIB
        received = 0
        async with client.stream("GET", f"{base}/file/workspace/big") as answer:
            assert int(answer.headers["content-length"]) == FILE_MIB * MIB
            async for piece in answer.aiter_raw(MIB):
                received += len(piece)
        assert received == FILE_MIB * MIB
    assert peak.growth < GROWTH_BYTES


async def test_buffered_output_beyond_the_bound(sandbox) -> None:
    server, client, base = sandbox
    async with Peak(server) as peak:
        answer = await client.post(f"{base}/exec", json={"command": "head -c 200000000 /dev/zero | tr '\\0' 'a'"})
    result = answer.json()
    assert result["stdout_truncated_bytes"] == 200_000_000 - 16 * MIB
    assert "output cut here" in result["stdout"][-200:]
    assert peak.growth < 3 * GROWTH_BYTES  # the kept part, as bytes, as text and as JSON
