"""The wire itself: what clients in other languages send and expect (PROTOCOL 1.5, 1.6, 2, 3)."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable
from urllib.parse import quote

import httpx
import pytest

from contract.raw import Ref, create, error_of, stream

pytestmark = pytest.mark.contract

NewKey = Callable[[], str]


async def test_create_says_truthfully_whether_it_created(http: httpx.AsyncClient, new_key: NewKey) -> None:
    key = new_key()
    first = await http.post(f"/v1/sandboxes/{key}", json={})
    second = await http.post(f"/v1/sandboxes/{key}", content=b"{ not even JSON")
    assert (first.status_code, second.status_code) == (201, 200)
    for answer in (first, second):
        document = answer.json()
        assert document == {"id": document["id"], "key": key, "status": "running"}
        assert uuid.UUID(document["id"])
        assert answer.headers["x-hiver-sandbox-id"] == document["id"]
        assert answer.headers["x-hiver-sandbox-key"] == key
        assert answer.headers["content-type"].startswith("application/json")
    assert first.json()["id"] == second.json()["id"]


async def test_racing_creates_yield_one_201(http: httpx.AsyncClient, new_key: NewKey) -> None:
    key = new_key()
    answers = await asyncio.gather(*(http.post(f"/v1/sandboxes/{key}", json={}) for _ in range(12)))
    assert sorted(answer.status_code for answer in answers) == [200] * 11 + [201]
    assert len({answer.json()["id"] for answer in answers}) == 1


async def test_the_image_header_counts_when_the_body_names_none(http: httpx.AsyncClient, new_key: NewKey) -> None:
    unknown = {"x-hiver-image": "no-such-image-in-header"}
    answer = await http.post(f"/v1/sandboxes/{new_key()}", json={}, headers=unknown)
    assert 400 <= answer.status_code < 500
    assert "no-such-image-in-header" in error_of(answer, answer.status_code)
    answer = await http.post(f"/v1/sandboxes/{new_key()}", json={"image": "host"}, headers=unknown)
    assert answer.status_code == 201, answer.text


async def test_a_body_needs_no_content_type(http: httpx.AsyncClient, new_key: NewKey) -> None:
    answer = await http.post(
        f"/v1/sandboxes/{new_key()}", content=b'{"env":{"A":"1"}}', headers={"content-type": "text/plain"}
    )
    assert answer.status_code == 201
    empty = await http.post(f"/v1/sandboxes/{new_key()}", content=b"{}")
    assert empty.status_code == 201


async def test_members_without_a_meaning_here_are_accepted(http: httpx.AsyncClient, new_key: NewKey) -> None:
    """Some clients send `isolation`, others `request_cpu` (PROTOCOL 4.1)."""
    body = {"request_cpu": 0.25, "isolation": "container"}
    assert (await http.post(f"/v1/sandboxes/{new_key()}", json=body)).status_code == 201


async def test_unknown_members_are_refused_by_name(http: httpx.AsyncClient, new_key: NewKey) -> None:
    """What the server does not understand is never silently ignored."""
    answer = await http.post(f"/v1/sandboxes/{new_key()}", json={"a_member_of_the_future": {"x": 1}})
    assert "a_member_of_the_future" in error_of(answer, 400)


async def test_other_languages_default_egress(http: httpx.AsyncClient, new_key: NewKey) -> None:
    rule = {"host": "*", "access": "allow"}
    ref = await create(http, new_key(), egress=[rule])
    assert (await http.get(ref.api("/config"))).json()["egress"] == [rule]


@pytest.mark.parametrize(
    "key_text", ["dotted.key-1", "0dcdf0c6-77f5-4f0c-9a9b-1f2d5c6a7b8c", "exec", "events", "config"]
)
async def test_awkward_keys_work_in_both_families(http: httpx.AsyncClient, key_text: str) -> None:
    """A key may look like an id or like an operation (PROTOCOL 1.6)."""
    ref = await create(http, key_text)
    try:
        encoded = f"/sandbox/{quote(ref.id, safe='')}/v1/" + "".join(f"%{byte:02X}" for byte in key_text.encode())
        for base in (ref.api(), ref.old_api(), encoded):
            answer = await http.post(base + "/exec", json={"command": "echo reached"})
            assert answer.status_code == 200, (base, answer.text)
            assert answer.json()["stdout"] == "reached\n"
        assert (await http.get(ref.api("/ping"))).status_code == 200
        assert (await http.get(ref.old_api("/ping"))).status_code == 200
    finally:
        assert (await http.delete(encoded)).is_success


async def test_the_id_of_another_sandbox_does_not_open_a_key(http: httpx.AsyncClient, new_key: NewKey) -> None:
    first, second = await create(http, new_key()), await create(http, new_key())
    error_of(await http.get(Ref(first.id, second.key).api("/config")), 404)
    error_of(await http.delete(Ref(first.id, second.key).api()), 404)
    assert (await http.get(second.api("/ping"))).status_code == 200


async def test_list_is_an_array_of_references(http: httpx.AsyncClient, new_key: NewKey) -> None:
    ref = await create(http, new_key())
    answer = await http.get("/controller/v1/sandboxes")
    assert isinstance(answer.json(), list)
    assert {"id": ref.id, "key": ref.key, "status": "running"} in answer.json()


async def test_ping_is_empty_and_may_block(http: httpx.AsyncClient, new_key: NewKey) -> None:
    ref = await create(http, new_key())
    for path in ("/ping", "/ping?block=true", "/ping?block=false"):
        answer = await http.get(ref.api(path))
        assert (answer.status_code, answer.content) == (200, b"")


async def test_pod_routes(http: httpx.AsyncClient, new_key: NewKey) -> None:
    ref = await create(http, new_key())
    answer = await http.get(f"/sandbox/{ref.id}/v1")
    assert answer.json() == {"sandboxes": [{"key": ref.key, "ready": True, "status": "running"}]}
    async with stream(http, "GET", f"/sandbox/{ref.id}/v1/events") as reader:
        first = await anext(reader.frames())
    assert first.data["key"] == ref.key


async def test_stdin_answers_exactly_204(http: httpx.AsyncClient, new_key: NewKey) -> None:
    ref = await create(http, new_key())
    path = ref.api(f"/exec-stream/{uuid.uuid4()}")
    async with stream(http, "POST", path, json={"command": "head -n 1"}) as reader:
        answer = await http.post(f"{path}/stdin", json={"data": "line\n"})
        assert (answer.status_code, answer.content) == (204, b"")
        frames = [frame async for frame in reader.frames()]
    assert [frame.data for frame in frames] == [{"text": "line\n", "type": "stdout"}, {"code": 0, "type": "exit"}]
    assert [frame.event for frame in frames] == ["stdout", "exit"]
    assert [frame.id for frame in frames] == [None, None]
    error_of(await http.post(f"{path}/stdin", json={"data": "x"}), 404)
    error_of(await http.post(f"{path}/stdin", content=b"{"), 400)


@pytest.mark.parametrize("body", [{}, {"command": None}, {"command": ""}, {"command": []}])
async def test_an_empty_command_does_nothing(http: httpx.AsyncClient, new_key: NewKey, body: dict[str, object]) -> None:
    ref = await create(http, new_key())
    answer = await http.post(ref.api("/exec"), json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"stdout": "", "stderr": "", "exit_code": 0}


async def test_answers_hold_no_null(http: httpx.AsyncClient, new_key: NewKey) -> None:
    """Old TypeScript clients reject null, Python rejects `fs: []` (PROTOCOL 2)."""
    ref = await create(http, new_key(), fs=[])
    everything = [
        (await http.get(ref.api("/config"))).json(),
        (await http.put(ref.api("/config"), json={})).json(),
        (await http.get(ref.api("/ports"))).json(),
        (await http.get(ref.api("/info"))).json(),
        (await http.get("/controller/v1/sandboxes")).json(),
        (await http.get(ref.api("/directories?path=/"))).json(),
        (await http.post(ref.api("/exec"), json={"command": "true"})).json(),
    ]
    assert "null" not in json.dumps(everything).replace('"null"', "")
    assert "fs" not in everything[0], "a sandbox without mounts: fs must not be an empty list"


async def test_apply_is_exclusive(http: httpx.AsyncClient, new_key: NewKey) -> None:
    """While one apply runs another is refused with 409 (PROTOCOL 3.9)."""
    ref = await create(http, new_key())
    mounts = [{"backend": "local", "mount": f"/mount-{number:02}"} for number in range(12)]
    seen: set[int] = set()
    for _ in range(20):
        bodies = [{"fs": mounts}, {"fs": mounts[:6]}] * 4
        answers = await asyncio.gather(*(http.put(ref.api("/config"), json=body) for body in bodies))
        seen |= {answer.status_code for answer in answers}
        for answer in answers:
            if answer.status_code == 409:
                assert "progress" in error_of(answer, 409)
        if 409 in seen:
            break
    assert seen == {200, 409}
    final = await http.put(ref.api("/config"), json={"fs": mounts})
    assert final.json()["applied"] is True
    listed = await http.post(ref.api("/exec"), json={"command": "ls -d /mount-*"})
    assert listed.json()["stdout"].split() == sorted(mount["mount"] for mount in mounts)


async def test_put_replaces_the_whole_configuration(http: httpx.AsyncClient, new_key: NewKey) -> None:
    ref = await create(http, new_key(), ttl=99, egress=[{"access": "deny", "host": "x"}], env={"KEEP": "me"})
    answer = (await http.put(ref.api("/config"), json={"fs": []})).json()
    assert answer["applied"] is True
    assert [mount["mount"] for mount in answer["changes"]["fs"]["removed"]] == ["/workspace"]
    assert [rule["host"] for rule in answer["changes"]["egress"]["removed"]] == ["x"]
    config = (await http.get(ref.api("/config"))).json()
    assert "ttl" not in config
    assert "fs" not in config
    assert config["env"] == {"KEEP": "me"}
    assert config == answer["config"]
    back = (await http.put(ref.api("/config"), json={})).json()
    assert [mount["mount"] for mount in back["changes"]["fs"]["added"]] == ["/workspace"], "absent is the default (0.3)"


async def test_a_proxied_port_that_is_not_one_is_an_error(http: httpx.AsyncClient, new_key: NewKey) -> None:
    ref = await create(http, new_key())
    for port in ("abc", "0", "65536", "-1", "80x"):
        error_of(await http.get(ref.api(f"/proxy/{port}/")), 400)


async def test_download_headers(http: httpx.AsyncClient, new_key: NewKey) -> None:
    ref = await create(http, new_key())
    name = 'qu"ote.txt'
    await http.post(ref.api("/file/workspace/" + quote(name, safe="")), content=b"0123456789")
    answer = await http.get(ref.api("/file/workspace/" + quote(name, safe="")), params={"offset": 3})
    assert answer.content == b"3456789"
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-length"] == "7"
    assert answer.headers["content-disposition"].startswith("attachment; filename=")
    assert '"' not in answer.headers["content-disposition"].removeprefix('attachment; filename="')[:2]
    for offset in ("-1", "11", "x"):
        error_of(await http.get(ref.api("/file/workspace/" + quote(name, safe="")), params={"offset": offset}), 400)


async def test_an_interrupted_upload_leaves_no_file(http: httpx.AsyncClient, new_key: NewKey) -> None:
    ref = await create(http, new_key())
    await http.post(ref.api("/file/workspace/f"), content=b"before")

    async def breaking() -> AsyncIterator[bytes]:
        yield b"x" * 100_000
        raise ConnectionError("the sender left")

    for path in ("/file/workspace/f", "/file/workspace/g"):
        with pytest.raises(ConnectionError):
            await http.post(ref.api(path), content=breaking())
    listing = await http.get(ref.api("/directories?path=/workspace"))
    assert [entry["name"] for entry in listing.json()["entries"]] == ["f"]
    assert (await http.get(ref.api("/file/workspace/f"))).content == b"before"


async def test_an_idle_connection_is_the_clients_to_close(http: httpx.AsyncClient) -> None:
    """httpx drops what has been idle for 5 s; a server that closes then, too, loses the request of then."""
    reader, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
    try:
        writer.write(b"GET /v1/sandboxes HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(), 7)  # until the server closes
    finally:
        writer.close()
        await writer.wait_closed()
