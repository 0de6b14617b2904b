"""Many sandboxes come and go, and nothing stays (issue: must hold)."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable

import httpx
import psutil
import pytest

from support.leaks import marks_of, traces, wait_until_clean
from support.plain import plain_client
from support.server import DEFAULT_CONFIG, Backend, Server, keys_of
from support.waiting import until

pytestmark = [pytest.mark.system, pytest.mark.slow]

MakeServer = Callable[..., Server]
CYCLES = int(os.environ.get("HIVER_TEST_CHURN_CYCLES", "1000"))
DOCKER_CYCLES = 60
"""An Engine takes its time for each."""
AT_A_TIME = 50


async def test_cycles_leave_nothing(make_server: MakeServer, isolated_by: Backend) -> None:
    # Without volumes kept ready: what bears the server's mark is then the server itself.
    server = make_server(config=DEFAULT_CONFIG + "[files]\nvolume_warm = 0\n")
    marks = marks_of(server.data_dir)
    server.start()
    process = psutil.Process(server.pid)
    limits = httpx.Limits(max_connections=AT_A_TIME, max_keepalive_connections=AT_A_TIME)
    async with plain_client(base_url=server.url, timeout=120, limits=limits) as client:
        await asyncio.gather(*(cycle(client, f"warm-{n}") for n in range(AT_A_TIME)))
        await settled(server)
        traces_before = traces(marks)
        gate = asyncio.Semaphore(AT_A_TIME)

        async def one(number: int) -> None:
            async with gate:
                await cycle(client, f"c{number}")

        descriptors_before = process.num_fds()
        threads_before = process.num_threads()
        cycles = CYCLES if isolated_by.name == "oci" else min(CYCLES, DOCKER_CYCLES)
        await asyncio.gather(*(one(number) for number in range(cycles)))
        await settled(server)
        until_only(traces_before, marks)
        assert process.num_fds() <= descriptors_before + 20  # idle connections; a leak would be hundreds
        assert process.num_threads() <= threads_before + 40  # pools grow to their size; a leak would be hundreds
    with sqlite3.connect(f"file:{server.data_dir}/hiver.sqlite3?mode=ro", uri=True) as database:
        assert database.execute("SELECT count(*) FROM sandboxes").fetchone() == (0,)
        assert database.execute("SELECT count(*) FROM events").fetchone() == (0,)
    database.close()
    assert server.stop() == 0
    wait_until_clean(marks)


def until_only(before: list[str], marks: frozenset[str]) -> None:
    """Waits until nothing is left that was not there before."""
    try:
        until(lambda: set(traces(marks)) <= set(before), seconds=30, what="no more traces than before")
    except TimeoutError:
        raise AssertionError("left behind:\n" + "\n".join(set(traces(marks)) - set(before))) from None


async def cycle(client: httpx.AsyncClient, key: str) -> None:
    created = await client.post(f"/v1/sandboxes/{key}", json={})
    assert created.status_code == 201, created.text
    base = f"/sandbox/{created.json()['id']}/v1/{key}"
    result = await client.post(f"{base}/exec", json={"command": ["echo", key]})
    assert result.json()["stdout"] == f"{key}\n", result.text
    assert (await client.delete(base)).status_code in {200, 204}


async def settled(server: Server) -> None:
    until(lambda: keys_of(server) == [], seconds=60, what="no sandbox left")


async def test_races_of_create_exec_and_shutdown(make_server: MakeServer) -> None:
    """All at once on few keys: every answer is one that the documentation names, and nothing stays."""
    server = make_server()
    marks = marks_of(server.data_dir)
    server.start()
    seen: set[int] = set()

    async with plain_client(base_url=server.url, timeout=60) as client:

        async def worker(number: int) -> None:
            for step in range(8):
                key = f"race-{(number + step) % 3}"
                created = await client.post(f"/v1/sandboxes/{key}", json={})
                seen.add(created.status_code)
                assert created.status_code in {200, 201, 409}, created.text
                if created.status_code == 409:
                    continue
                base = f"/sandbox/{created.json()['id']}/v1/{key}"
                ran, removed = await asyncio.gather(
                    client.post(f"{base}/exec", json={"command": "sleep 0.05; echo done"}), client.delete(base)
                )
                assert ran.status_code in {200, 404, 500, 503}, ran.text
                if ran.status_code == 200:
                    result = ran.json()
                    assert result.get("exit_code") in {0, 137} or "error" in result, result
                assert removed.status_code in {200, 204, 404}, removed.text

        await asyncio.gather(*(worker(number) for number in range(12)))
    assert 201 in seen
    until(lambda: keys_of(server) == [], seconds=30, what="no sandbox left")
    assert server.stop() == 0
    wait_until_clean(marks)
