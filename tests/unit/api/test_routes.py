"""Route families, error shapes, the browser guard: everything that needs no real sandbox."""

from __future__ import annotations

import asyncio
import json

import pytest


def events_of(text: str) -> list[dict]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


async def test_created_then_existing(server):
    first = await server.client.post("/v1/sandboxes/k", json={})
    second = await server.client.post("/v1/sandboxes/k", content=b"not even json")
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json()["id"] == second.json()["id"] == first.headers["x-hiver-sandbox-id"]
    assert first.headers["x-hiver-sandbox-key"] == "k"


@pytest.mark.parametrize("key", ["exec", "events", "file", "config", "ping", "proxy", "exec-stream", "a.b"])
async def test_keys_named_like_operations_work_in_both_families(server, key):
    base = await server.create(key)
    assert (await server.client.get(f"{base}/ping")).status_code == 200
    assert (await server.client.get(f"/sandbox/{key}/v1/ping")).status_code == 200
    assert (await server.client.post(f"{base}/exec", json={"command": ["x"]})).json()["stdout"] == "x\n"
    assert (await server.client.post(f"/sandbox/{key}/v1/exec", json={"command": ["x"]})).json()["stdout"] == "x\n"
    assert (await server.client.delete(base)).status_code == 204


async def test_a_key_that_looks_like_an_id(server):
    uuid_like = "123e4567-e89b-12d3-a456-426614174000"
    await server.create(uuid_like)
    assert (await server.client.get(f"/sandbox/{uuid_like}/v1/ping")).status_code == 200


async def test_old_family_create_list_and_shutdown(server):
    answer = await server.client.put("/controller/v1/sandboxes/old", json={})
    assert answer.status_code == 201
    assert [s["key"] for s in (await server.client.get("/controller/v1/sandboxes")).json()] == ["old"]
    assert (await server.client.post("/controller/v1/shutdown/old")).status_code == 204
    gone = await server.client.post("/controller/v1/shutdown/old")
    assert gone.status_code == 404
    assert "old" in gone.json()["error"]


async def test_old_clients_see_only_events_that_they_can_parse(server):
    base = await server.create("k")
    await server.client.post(f"{base}/exec", json={"command": ["x"]})
    await server.client.put(f"{base}/config", json={"ttl": 9})
    new = events_of((await server.client.get(f"{base}/events?follow=false")).text)
    old = events_of((await server.client.get("/sandbox/k/v1/events?follow=false")).text)
    assert {"system.start", "system.config-changed"} <= {event["type"] for event in new}
    assert not [event for event in old if event["type"].startswith("system.")]
    assert [event for event in new if not event["type"].startswith("system.")] == old


async def test_resume_by_query_and_header(server):
    base = await server.create()
    for _ in range(3):
        await server.client.post(f"{base}/exec", json={"command": ["x"]})
    everything = events_of((await server.client.get(f"{base}/events?follow=false")).text)
    ids = [event["id"] for event in everything]
    assert ids == sorted(set(ids))
    rest = events_of((await server.client.get(f"{base}/events?follow=false&lastEventId={ids[4]}")).text)
    assert [event["id"] for event in rest] == ids[5:]
    header = await server.client.get(
        f"{base}/events?follow=false&lastEventId=1", headers={"Last-Event-ID": str(ids[-2])}
    )
    assert [event["id"] for event in events_of(header.text)] == ids[-1:]
    assert (await server.client.get(f"{base}/events?lastEventId=x")).status_code == 400


async def test_a_followed_stream_ends_with_the_sandbox(server):
    base = await server.create()
    async with server.client.stream("GET", f"{base}/events") as stream:
        lines = stream.aiter_lines()
        async for line in lines:
            if "system.start" in line:
                break
        await server.client.post(f"{base}/exec", json={"command": ["x"]})
        await server.client.delete(base)
        rest = [line async for line in lines]
    assert any("exec.response" in line for line in rest)


async def test_lifecycle_stream_tells_of_this_sandbox_only_what_happens_to_it(server):
    await server.create("first")
    async with server.client.stream("GET", "/controller/v1/sandboxes/events") as stream:
        lines = stream.aiter_lines()
        seen = []

        async def next_event():
            async for line in lines:
                if line.startswith("data: "):
                    return json.loads(line[6:])
            return None

        seen.append(await next_event())
        base = await server.create("second")
        seen.append(await next_event())
        await server.client.delete(base)
        seen += [await next_event(), await next_event()]
    assert [(event["key"], event["status"]) for event in seen] == [
        ("first", "start"),
        ("second", "start"),
        ("second", "stop"),
        ("second", "destroy"),
    ]


async def test_exec_streams_frames_and_an_exit(server):
    base = await server.create()
    answer = await server.client.post(f"{base}/exec-stream/x", json={"command": ["smörgås", "\u2028"]})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.content.isascii()
    frames = events_of(answer.text)
    assert frames == [{"text": "smörgås \u2028\n", "type": "stdout"}, {"code": 0, "type": "exit"}]


async def test_a_caller_who_leaves_kills_the_command(server):
    base = await server.create()
    async with server.client.stream("POST", f"{base}/exec-stream/x", json={"command": ["wait-for-kill"]}) as stream:
        async for line in stream.aiter_lines():
            if "wait-for-kill" in line:
                break
    workload = next(iter(server.isolation.workloads.values()))
    async with asyncio.timeout(5):
        while not workload.processes[0].closed:
            await asyncio.sleep(0.01)


async def test_a_caller_of_exec_who_leaves_kills_the_command(server):
    base = await server.create()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(server.client.post(f"{base}/exec", json={"command": ["wait-for-kill"]}), 0.3)
    workload = next(iter(server.isolation.workloads.values()))
    async with asyncio.timeout(5):
        while not workload.processes[0].closed:
            await asyncio.sleep(0.01)


async def test_a_long_exec_is_kept_alive_with_white_space(server):
    base = await server.create()
    async with server.client.stream("POST", f"{base}/exec", json={"command": ["wait-for-kill"]}) as stream:
        pieces = stream.aiter_raw()
        assert stream.status_code == 200
        assert (await anext(pieces)) == b" "
        assert (await anext(pieces)).strip() == b""
        next(iter(server.isolation.workloads.values())).processes[0]._killed.set()
        body = b"".join([piece async for piece in pieces])
    assert json.loads(body)["exit_code"] == 137


async def test_output_beyond_the_bound_is_cut_and_said(server):
    base = await server.create()
    result = (await server.client.post(f"{base}/exec", json={"command": ["y" * 5000]})).json()
    assert result["stdout_truncated_bytes"] == 5001 - 2048
    assert "2953 more bytes" in result["stdout"]


async def test_an_empty_command_succeeds_without_running(server):
    base = await server.create()
    for body in ({}, {"command": ""}, {"command": []}, {"command": None}):
        assert (await server.client.post(f"{base}/exec", json=body)).json() == {
            "stdout": "",
            "stderr": "",
            "exit_code": 0,
        }
    attach = await server.client.post(f"{base}/exec-stream/x", json={})
    assert attach.status_code == 400
    assert "tty" in attach.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("POST", "/v1/sandboxes/bad key", b"{}", 400, "key"),
        ("POST", "/v1/sandboxes/k2", b'{"memory": "much"}', 400, "memory"),
        ("POST", "/v1/sandboxes/k2", b'{"fs": [{"backend": "s3", "mount": "/x"}]}', 400, "fs[0]"),
        ("POST", "{base}/exec", b'{"command": 7}', 400, "command"),
        ("POST", "{base}/exec-stream/none/stdin", b'{"data": "x"}', 404, "none"),
        ("POST", "{base}/exec-stream/none/stdin", b"[]", 400, "body"),
        ("PUT", "{base}/config", b'{"ttl": -1}', 400, "ttl"),
        ("POST", "{base}/snapshot", b"{}", 400, "capture"),
        ("POST", "{base}/snapshot", b'{"files": {"key": "k", "mount": "/none"}}', 400, "mount"),
        ("GET", "{base}/nothing", b"", 404, "Not Found"),
        ("GET", "/sandbox/unknown/v1/k/ping", b"", 404, "unknown"),
        ("GET", "/sandbox/unknown", b"", 404, "no such route"),
        ("GET", "{base}/proxy/x/", b"", 400, "port"),
        ("GET", "{base}/proxy/1024/", b"", 403, "1024"),
    ],
)
async def test_errors_name_what_is_wrong(server, method, path, body, status, words):
    base = await server.create()
    answer = await server.client.request(method, path.format(base=base), content=body)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Host": "evil.example"},
        {"Host": "localhost.evil.example:10000"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-origin"},
    ],
)
async def test_web_pages_are_kept_out(server, headers):
    base = await server.create()
    for method, path in (("GET", "/controller/v1/sandboxes"), ("POST", f"{base}/exec"), ("GET", f"{base}/events")):
        answer = await server.client.request(method, path, headers=headers, json={})
        assert answer.status_code == 403, path
        assert answer.json()["error"]
    proxied = await server.client.get(f"{base}/proxy/1024/", headers=headers)
    assert "reserved" in proxied.json()["error"]  # the gateway's own refusal: the guard let it through


@pytest.mark.parametrize("host", ["localhost:10000", "127.0.0.1", "[::1]:80", "LOCALHOST", "192.0.2.7:1"])
async def test_our_own_names_are_let_in(server, host):
    assert (await server.client.get("/controller/v1/sandboxes", headers={"Host": host})).status_code == 200


async def test_a_body_beyond_the_bound_is_refused(server):
    answer = await server.client.post("/v1/sandboxes/k", content=b" " * (9 << 20))
    assert answer.status_code == 413
    assert answer.json()["error"]


async def test_no_null_in_any_answer(server):
    base = await server.create("k", cpu=2)
    for path in (f"{base}/config", f"{base}/info", "/controller/v1/sandboxes"):
        assert "null" not in (await server.client.get(path)).text
    assert (await server.client.get(f"{base}/config")).json()["cpu"] == 2


async def test_a_client_that_fails_on_new_events_is_recognised(server):
    """As releases 0.1.20 to 0.1.35: they drop the connection at `system.start` and come back 0.2 s later."""
    base = await server.create()
    await server.client.post(f"{base}/exec", json={"command": ["x"]})

    async def first_event() -> dict:
        async with server.client.stream("GET", f"{base}/events") as stream:
            async for line in stream.aiter_lines():
                if line.startswith("data: "):
                    return json.loads(line[6:])
        raise AssertionError("no event")

    assert (await first_event())["type"] == "system.start"
    await asyncio.sleep(0.2)  # the client's own delay
    assert (await first_event())["type"] == "exec.request"
    # A client that reads everything and begins anew later gets everything.
    assert (await first_event())["type"] == "system.start"


async def test_a_path_of_files_below_a_key_is_not_taken_for_the_old_form(server):
    """A rule may open `/sandbox/*/v1/file/**` to an agent, for a sandbox with the key `file` (PROTOCOL 4.5)."""
    await server.client.post("/v1/sandboxes/victim", json={})
    answer = await server.client.get("/sandbox/victim/v1/file/etc/hostname")
    assert answer.status_code == 404
    assert "victim" in answer.json()["error"]
    assert (await server.client.get("/sandbox/victim/v1/file?path=/nowhere")).status_code == 404
