"""Event streams byte by byte (PROTOCOL 2, 3.3, 3.12, 3.14, 0.7, 7)."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from contract.raw import Frame, Ref, SseReader, create, error_of, stream
from support.waiting import until_async

pytestmark = pytest.mark.contract

NewKey = Callable[[], str]

LINE_LIMIT_BYTES = 64 * 1024
"""The Go client's scanner breaks on longer lines (PROTOCOL 1.5)."""
SYSTEM_TYPES = {"system.start", "system.config-changed", "system.shutdown", "system.vm-resumed"}


async def run(http: httpx.AsyncClient, ref: Ref, command: str) -> dict[str, Any]:
    answer = await http.post(ref.api("/exec"), json={"command": command})
    assert answer.status_code == 200, answer.text
    result = answer.json()
    assert isinstance(result, dict)
    return result


async def replay(http: httpx.AsyncClient, path: str, **options: Any) -> list[Frame]:
    """Everything that an ending event stream holds."""
    async with stream(http, "GET", path, **options) as reader:
        return [frame async for frame in reader.frames()]


async def test_headers_come_before_anything_happens(http: httpx.AsyncClient, new_key: NewKey) -> None:
    ref = await create(http, new_key(), events=[])
    paths = ("/controller/v1/sandboxes/events", ref.api("/events"), f"/sandbox/{ref.id}/v1/events")
    for path in paths:
        began_monotonic = time.monotonic()
        async with stream(http, "GET", path) as reader:
            assert time.monotonic() - began_monotonic < 1.5
            assert "no-cache" in reader.response.headers["cache-control"]


async def test_silent_streams_carry_comments(http: httpx.AsyncClient, new_key: NewKey) -> None:
    """At least one byte every 2 s (PROTOCOL 0.7), with slack for a busy machine."""
    ref = await create(http, new_key(), events=[])
    paths = {
        "GET": (ref.api("/events"), "/controller/v1/sandboxes/events"),
        "POST": (ref.api(f"/exec-stream/{uuid.uuid4()}"),),
    }

    async def longest_pause_seconds(method: str, path: str) -> float:
        body = {"command": "sleep 1000"} if method == "POST" else None
        async with http.stream(method, path, json=body, timeout=10) as response:
            pieces = response.aiter_raw()
            pauses = []
            for _ in range(3):
                began_monotonic = time.monotonic()
                await anext(pieces)
                pauses.append(time.monotonic() - began_monotonic)
        return max(pauses)

    calls = [longest_pause_seconds(method, path) for method, group in paths.items() for path in group]
    assert max(await asyncio.gather(*calls)) < 2.9


async def test_long_answers_carry_a_space_each_second(http: httpx.AsyncClient, new_key: NewKey) -> None:
    ref = await create(http, new_key())
    async with http.stream("POST", ref.api("/exec"), json={"command": "sleep 4; echo x"}, timeout=2.9) as response:
        body = b"".join([piece async for piece in response.aiter_raw()])
    assert len(body) - len(body.lstrip(b" ")) >= 2
    assert response.headers["content-type"].startswith("application/json")


async def test_only_ascii_is_on_the_wire(http: httpx.AsyncClient, new_key: NewKey) -> None:
    ref = await create(http, new_key())
    async with stream(
        http, "POST", ref.api(f"/exec-stream/{uuid.uuid4()}"), json={"command": "echo 'é€😀 \u2028'"}
    ) as reader:
        frames = [frame async for frame in reader.frames()]
    assert frames[0].data["text"] == "é€😀 \u2028\n"
    assert reader.received.isascii()
    async with stream(http, "GET", ref.api("/events?follow=false")) as reader:
        frames = [frame async for frame in reader.frames()]
    assert "é€😀 \u2028\n" in [frame.data.get("stdout") for frame in frames]
    assert reader.received.isascii()


async def test_lines_stay_short_enough_for_every_client(http: httpx.AsyncClient, new_key: NewKey) -> None:
    ref = await create(http, new_key())
    command = "head -c 400000 /dev/zero | tr '\\0' '\\001'"  # six bytes each as JSON
    async with stream(http, "POST", ref.api(f"/exec-stream/{uuid.uuid4()}"), json={"command": command}) as reader:
        frames = [frame async for frame in reader.frames()]
    assert "".join(frame.data.get("text", "") for frame in frames) == "\x01" * 400_000
    assert reader.longest_line_bytes < LINE_LIMIT_BYTES
    async with stream(http, "GET", ref.api("/events?follow=false")) as reader:
        async for _ in reader.frames():
            pass
    assert reader.longest_line_bytes < LINE_LIMIT_BYTES


@pytest.mark.parametrize(
    ("command", "code"),
    [("true", 0), ("exit 9", 9), ("kill -9 $$", 137), ("no-such-program", 127), ("printf 'no newline'", 0)],
)
async def test_exit_is_the_last_frame(http: httpx.AsyncClient, new_key: NewKey, command: str, code: int) -> None:
    ref = await create(http, new_key())
    async with stream(http, "POST", ref.api(f"/exec-stream/{uuid.uuid4()}"), json={"command": command}) as reader:
        frames = [frame async for frame in reader.frames()]
    assert frames[-1].data == {"code": code, "type": "exit"}
    assert [frame.data["type"] for frame in frames].count("exit") == 1


async def test_event_frames_have_the_documented_form(http: httpx.AsyncClient, new_key: NewKey) -> None:
    ref = await create(http, new_key())
    await run(http, ref, "echo x")
    frames = await replay(http, ref.api("/events?follow=false"))
    ids = [int(str(frame.id)) for frame in frames]
    assert ids == sorted(set(ids))
    assert ids[0] == 1
    assert ids == [frame.data["id"] for frame in frames]
    assert {frame.event for frame in frames} == {None}
    assert all(frame.data["timestamp"].endswith("Z") for frame in frames)
    kinds = [frame.data["type"] for frame in frames if frame.data["type"] != "resource.usage"]
    assert kinds == ["system.start", "exec.request", "stdio", "exec.response"]


async def test_replay_ends_at_once_without_follow(http: httpx.AsyncClient, new_key: NewKey) -> None:
    """The TypeScript client gives up after 500 ms of silence in this mode (PROTOCOL 1.5)."""
    ref = await create(http, new_key())
    await run(http, ref, "echo x")
    for path in (ref.api("/events"), ref.old_api("/events")):
        began_monotonic = time.monotonic()
        assert await replay(http, path, params={"follow": "false"})
        assert time.monotonic() - began_monotonic < 0.5


async def test_where_a_replay_begins(http: httpx.AsyncClient, new_key: NewKey) -> None:
    ref = await create(http, new_key(), ttl=0)
    for number in range(4):
        await run(http, ref, f"echo {number}")
    path = ref.api("/events?follow=false")
    everything = [frame.data["id"] for frame in await replay(http, path)]
    middle = everything[len(everything) // 2]
    later = [number for number in everything if number > middle]
    newest = everything[-1]

    async def ids(query: str = "", header: str | None = None) -> list[int]:
        headers = {"Last-Event-ID": header} if header is not None else {}
        frames = await replay(http, path + query, headers=headers)
        return [frame.data["id"] for frame in frames if frame.data["id"] <= newest]

    assert await ids(f"&lastEventId={middle}") == later
    assert await ids(header=str(middle)) == later
    assert await ids(f"&lastEventId={newest}", header=str(middle)) == later, "the header wins"
    assert await ids(f"&lastEventId={middle}", header="not a number") == later, "a bad header is ignored"
    assert await ids("&lastEventId=0") == everything
    assert await ids("&lastEventId=999999999") == []
    error_of(await http.get(ref.api("/events"), params={"lastEventId": "x"}), 400)


async def test_old_clients_meet_no_unknown_event(http: httpx.AsyncClient, new_key: NewKey) -> None:
    """PROTOCOL 7: the old family gets no `system.*` and no `ingress.chunk`, and `delete` becomes `write`."""
    ref = await create(http, new_key())
    await http.post(ref.api("/file/workspace/f"), content=b"x")
    await http.delete(ref.api("/file/workspace/f"))
    await http.put(ref.api("/config"), json={})
    new = await replay(http, ref.api("/events?follow=false"))
    old = await replay(http, ref.old_api("/events?follow=false"))
    assert {"system.start", "system.config-changed"} <= {frame.data["type"] for frame in new}
    assert not {frame.data["type"] for frame in old} & (SYSTEM_TYPES | {"ingress.chunk"})
    operations = {frame.data["id"]: frame.data["operation"] for frame in new if frame.data["type"] == "fs.request"}
    assert "delete" in operations.values()
    assert {frame.data["operation"] for frame in old if frame.data["type"] == "fs.request"} == {"write"}


async def test_many_readers_see_the_same(http: httpx.AsyncClient, new_key: NewKey) -> None:
    ref = await create(http, new_key(), events=["stdio"])

    async def read(reader: SseReader, wanted: int) -> list[int]:
        found = []
        async for frame in reader.frames():
            found.append(frame.data["id"])
            if len(found) == wanted:
                return found
        raise AssertionError(f"the stream ended after {len(found)} events")

    async def follow() -> list[int]:
        async with stream(http, "GET", ref.api("/events")) as reader:
            return await asyncio.wait_for(read(reader, 300), 30)

    readers = [asyncio.create_task(follow()) for _ in range(5)]
    await run(http, ref, "seq 300")
    results = await asyncio.gather(*readers)
    assert all(result == results[0] for result in results)


class Following:
    """A stream read in the background."""

    def __init__(self, reader: SseReader) -> None:
        self.frames: list[Frame] = []
        self.task = asyncio.create_task(self._read(reader), name="follow")

    async def _read(self, reader: SseReader) -> None:
        async for frame in reader.frames():
            self.frames.append(frame)

    async def saw(self, probe: Callable[[], bool], what: str) -> None:
        async def check() -> bool:
            return probe()

        await until_async(check, seconds=15, what=what)


async def test_streams_end_with_the_sandbox(http: httpx.AsyncClient, new_key: NewKey) -> None:
    ref = await create(http, new_key())
    async with stream(http, "GET", ref.api("/events")) as reader:
        following = Following(reader)
        await following.saw(lambda: bool(following.frames), "the first event")
        assert (await http.delete(ref.api())).is_success
        await asyncio.wait_for(following.task, 20)


async def test_a_stream_is_not_closed_needlessly(http: httpx.AsyncClient, new_key: NewKey) -> None:
    """Clients reconnect at most three times in a stream's life (PROTOCOL 2): quiet or busy, it stays open."""
    ref = await create(http, new_key(), events=["stdio"])
    async with stream(http, "GET", ref.api("/events")) as reader:
        following = Following(reader)
        for number in range(3):
            await run(http, ref, f"echo {number}")
            await http.put(ref.api("/config"), json={"events": ["stdio"], "ttl": 100 + number})
            comments = reader.comments
            await following.saw(lambda before=comments: reader.comments > before, "a comment")  # type: ignore[misc]
            assert not following.task.done()
        printed = [frame.data["stdout"] for frame in following.frames]
        following.task.cancel()
    assert printed == ["0\n", "1\n", "2\n"]
