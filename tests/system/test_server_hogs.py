"""A fork bomb, a memory hog and a disk filler hurt only themselves (issue: must hold)."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable

import httpx
import pytest

from support.leaks import marks_of, wait_until_clean
from support.plain import plain_client
from support.server import DEFAULT_CONFIG, Server

pytestmark = [pytest.mark.system, pytest.mark.slow]

HOGS = {
    "fork-bomb": "bomb() { bomb | bomb & }; bomb; sleep 60",
    "memory": 'python3 -c "b=[]\nwhile True: b.append(bytearray(1<<20))"',
    "disk": "cat /dev/zero > /workspace/fill; cat /dev/zero > /fill; sleep 60",
}


async def typical_ms(client: httpx.AsyncClient, base: str) -> float:
    """Median time of an exec in the neighbour, and of the server's list."""
    times = []
    for _ in range(15):
        began = time.perf_counter()
        assert (await client.post(f"{base}/exec", json={"command": ["true"]})).json()["exit_code"] == 0
        assert (await client.get("/controller/v1/sandboxes")).status_code == 200
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


@pytest.mark.parametrize("hog", HOGS)
async def test_a_hog_hurts_only_itself(make_server: Callable[..., Server], hog: str) -> None:
    server = make_server(config=DEFAULT_CONFIG + "[sandbox]\ndisk_mib = 256\n")
    marks = marks_of(server.data_dir)
    server.start()
    async with plain_client(base_url=server.url, timeout=60) as client:
        bases = {}
        for key in ("hog", "neighbour"):
            answer = await client.post(f"/v1/sandboxes/{key}", json={"memory": 256})
            bases[key] = f"/sandbox/{answer.json()['id']}/v1/{key}"
        usual_ms = await typical_ms(client, bases["neighbour"])
        running = asyncio.ensure_future(client.post(f"{bases['hog']}/exec", json={"command": HOGS[hog]}))
        await asyncio.sleep(1.0)
        loaded_ms = await typical_ms(client, bases["neighbour"])
        # Twice is the aim, shown by the benchmark; a shared machine needs room, a starved neighbour takes seconds.
        assert loaded_ms < usual_ms * 10 + 200, (usual_ms, loaded_ms)
        written = await client.post(f"{bases['neighbour']}/file/workspace/x", content=b"x" * 1_000_000)
        assert written.status_code == 200
        began = time.monotonic()
        assert (await client.delete(bases["hog"])).status_code in {200, 204}
        assert time.monotonic() - began < 30
        await asyncio.wait({running}, timeout=30)
        assert running.done()
        assert (await client.get(f"{bases['neighbour']}/ping")).status_code == 200
        print(f"{hog}: {usual_ms:.1f} ms -> {loaded_ms:.1f} ms")
    assert server.stop() == 0
    wait_until_clean(marks)
