"""A web page must not be able to drive the API of a server on the user's own machine."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
import websockets
from websockets.exceptions import InvalidStatus

from contract.raw import create, error_of
from support.server import Server
from support.waiting import until_async

pytestmark = pytest.mark.contract

NewKey = Callable[[], str]

FOREIGN = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"host": "evil.example"},
    {"host": "evil.example:10000"},
    {"host": "localhost.evil.example"},
    {"host": "127.0.0.1.evil.example"},
    {"host": "evil.example", "origin": "http://evil.example"},
]


def _name(headers: dict[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in headers.items())


@pytest.mark.parametrize("headers", FOREIGN, ids=_name)
async def test_foreign_pages_are_refused(http: httpx.AsyncClient, new_key: NewKey, headers: dict[str, str]) -> None:
    ref = await create(http, new_key())
    victim = new_key()
    calls = [
        ("POST", f"/v1/sandboxes/{victim}"),
        ("PUT", f"/controller/v1/sandboxes/{victim}"),
        ("GET", "/controller/v1/sandboxes"),
        ("GET", "/controller/v1/sandboxes/events"),
        ("POST", f"/controller/v1/shutdown/{ref.key}"),
        ("POST", ref.api("/exec")),
        ("POST", ref.old_api("/exec")),
        ("POST", ref.api("/exec-stream/x")),
        ("GET", ref.api("/config")),
        ("GET", ref.api("/file/etc/hostname")),
        ("GET", ref.old_api("/file?path=/etc/hostname")),
        ("DELETE", ref.api()),
        ("OPTIONS", ref.api("/exec")),
        ("GET", "/schema/openapi.json"),
        ("GET", "/nothing"),
    ]
    for method, path in calls:
        answer = await http.request(
            method, path, headers=headers, json={"command": "true"} if method == "POST" else None
        )
        error_of(answer, 403)
        assert "access-control-allow-origin" not in answer.headers
    assert (await http.get(ref.api("/ping"))).status_code == 200
    assert victim not in (await http.get("/controller/v1/sandboxes")).text


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST"])
async def test_programs_on_this_machine_are_served(http: httpx.AsyncClient, server: Server, host: str) -> None:
    for text in (host, f"{host}:{server.port}"):
        assert (await http.get("/controller/v1/sandboxes", headers={"host": text})).status_code == 200


async def test_proxied_ports_are_for_browsers(http: httpx.AsyncClient, server: Server, new_key: NewKey) -> None:
    ref = await create(http, new_key(), entrypoint=["python3", "-m", "http.server", "8000", "--bind", "127.0.0.1"])

    async def up() -> bool:
        return (await http.get(ref.api("/proxy/8000/"))).status_code == 200

    await until_async(up, seconds=20, what="the inner server answers")
    for headers in FOREIGN:
        for path in (ref.api("/proxy/8000/"), ref.old_api("/proxy/8000/")):
            answer = await http.get(path, headers=headers)
            assert answer.status_code == 200, (headers, answer.text)


async def test_a_proxied_path_cannot_climb_out(http: httpx.AsyncClient, new_key: NewKey) -> None:
    """The guard is off for proxied ports only; no spelling of a path may make an API call look like one."""
    ref = await create(http, new_key())
    foreign = {"origin": "https://evil.example"}
    for path in (
        "/proxy/../exec",
        "/proxy/80/../../exec",
        "/proxy%2F80/../exec",
        "/%70roxy/../exec",
        "//exec",
        "/./exec",
    ):
        url = httpx.URL("http://ignored").copy_with(raw_path=ref.api(path).encode())
        request = http.build_request("POST", str(http.base_url), json={"command": "true"}, headers=foreign)
        request.url = request.url.copy_with(raw_path=url.raw_path)
        answer = await http.send(request)
        assert answer.status_code != 200, path
        assert "exit_code" not in answer.text


async def test_foreign_websockets_are_refused(server: Server, http: httpx.AsyncClient, new_key: NewKey) -> None:
    ref = await create(http, new_key())
    with pytest.raises(InvalidStatus) as refused:
        await websockets.connect(
            f"ws://127.0.0.1:{server.port}{ref.api('/exec')}", origin=websockets.Origin("https://evil.example")
        )
    assert refused.value.response.status_code in {403, 404}
