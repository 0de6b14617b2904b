"""`kill -9` of the server at random moments of create, exec, apply and shutdown; then a restart (issue: must hold)."""

from __future__ import annotations

import asyncio
import json
import os
import random
from pathlib import Path

import httpx
import pytest

from support.leaks import marks_of, wait_until_clean
from support.plain import plain_client
from support.server import Backend, Server, keys_of
from support.waiting import until

pytestmark = [pytest.mark.system, pytest.mark.slow]

DOCKER_ROUNDS = 4
ROUNDS = int(os.environ.get("HIVER_TEST_CRASH_ROUNDS", "12"))


async def create(client: httpx.AsyncClient, key: str, **config: object) -> str:
    answer = await client.post(f"/v1/sandboxes/{key}", json=config, timeout=60)
    assert answer.status_code in {200, 201}, answer.text
    return f"/sandbox/{answer.json()['id']}/v1/{key}"


async def run(client: httpx.AsyncClient, base: str, command: str) -> dict:
    answer = await client.post(f"{base}/exec", json={"command": command}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def event_ids(client: httpx.AsyncClient, base: str) -> list[int]:
    text = (await client.get(f"{base}/events?follow=false")).text
    return [json.loads(line[6:])["id"] for line in text.splitlines() if line.startswith("data: ")]


async def busy(client: httpx.AsyncClient, base: str, number: int) -> None:
    """Everything that changes state, all the time; every call may be cut off by the kill."""

    async def forever(step):
        while True:
            await step()

    async def churn() -> None:
        created = await client.post(f"/v1/sandboxes/churn-{number}-{random.randrange(4)}", json={})
        await client.delete(f"/sandbox/{created.json()['id']}/v1/{created.json()['key']}")

    async def exec_() -> None:
        await client.post(f"{base}/exec", json={"command": "echo x; sleep 0.02; echo y"})

    async def apply() -> None:
        mounts = [{"backend": "local", "mount": "/workspace"}]
        if random.random() < 0.5:
            mounts.append({"backend": "local", "mount": "/extra"})
        await client.put(f"{base}/config", json={"fs": mounts, "ttl": random.randrange(600, 900)})

    await asyncio.gather(forever(churn), forever(churn), forever(exec_), forever(apply))


async def test_kill_at_any_moment(tmp_path: Path, isolated_by: Backend) -> None:
    server = Server(tmp_path, ephemeral=False, backend=isolated_by)
    marks = marks_of(server.data_dir)
    server.start()
    random.seed(20)
    try:
        async with plain_client(base_url=server.url, timeout=20) as client:
            entrypoint = ["sh", "-c", "i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.2; done"]
            base = await create(client, "survivor", entrypoint=entrypoint, ttl=600)
            await run(
                client, base, "sleep 100000 >/dev/null 2>&1 & echo $! > /workspace/pid; echo kept > /workspace/data"
            )
        for number in range(ROUNDS if isolated_by.name == "oci" else min(ROUNDS, DOCKER_ROUNDS)):
            async with plain_client(base_url=server.url, timeout=20) as client:
                before = await event_ids(client, base)
                load = asyncio.ensure_future(busy(client, base, number))
                await asyncio.sleep(random.uniform(0.05, 1.2))
                server.kill()
                load.cancel()
                await asyncio.gather(load, return_exceptions=True)
            server.start()
            async with plain_client(base_url=server.url, timeout=20) as client:
                alive = await run(client, base, "cat /workspace/data; kill -0 $(cat /workspace/pid) && echo alive")
                assert alive["stdout"] == "kept\nalive\n", alive
                after = await event_ids(client, base)
                assert after == sorted(set(after))
                assert after[: len(before)] == before
                assert after[-1] > before[-1]
                await wait_for_only(client, "survivor")
                config = (await client.get(f"{base}/config")).json()
                mounted = (await run(client, base, "cut -d' ' -f2 /proc/mounts"))["stdout"].split()
                for mount in ("/workspace", "/extra"):
                    assert (mount in mounted) == (mount in [fs["mount"] for fs in config["fs"]]), mount
        async with plain_client(base_url=server.url, timeout=60) as client:
            events = (await client.get(f"{base}/events?follow=false")).text
            ticks = [line for line in events.splitlines() if '"stdout":"tick ' in line]
            numbers = [int(json.loads(line[6:])["stdout"].split()[1]) for line in ticks]
            assert numbers == list(range(1, len(numbers) + 1))  # recorded once each, over every restart
            assert (await client.delete(base)).status_code in {200, 204}
    finally:
        if server.running:
            server.stop()
    wait_until_clean(marks)


async def wait_for_only(client: httpx.AsyncClient, key: str) -> None:
    """What was half made or half removed goes; what was whole stays, and is removed here."""
    deadline = asyncio.get_running_loop().time() + 30
    while True:
        listed = (await client.get("/controller/v1/sandboxes")).json()
        others = [entry for entry in listed if entry["key"] != key]
        if not others:
            return
        assert asyncio.get_running_loop().time() < deadline, others
        for entry in others:
            await client.delete(f"/sandbox/{entry['id']}/v1/{entry['key']}")


async def test_a_ttl_counts_on_while_no_server_runs(tmp_path: Path, isolated_by: Backend) -> None:
    server = Server(tmp_path, ephemeral=False, backend=isolated_by)
    marks = marks_of(server.data_dir)
    server.start()
    async with plain_client(base_url=server.url, timeout=20) as client:
        await create(client, "k", ttl=3)
    server.kill()
    await asyncio.sleep(3.5)  # the time itself is what is tested
    server.start()
    until(lambda: keys_of(server) == [], seconds=8, what="expiry")
    server.stop()
    wait_until_clean(marks)
