"""Whatever is wrong with a request: 4xx, with the field and the reason, and nothing created (PROTOCOL 2, 4.4, 0.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from contract.raw import create, error_of

pytestmark = pytest.mark.contract

NewKey = Callable[[], str]
Body = dict[str, Any]


def _fs(**entry: Any) -> Body:
    return {"fs": [{"backend": "local", "mount": "/workspace", **entry}]}


def _rule(**entry: Any) -> Body:
    return {"egress": [{"access": "allow", "host": "x.example", **entry}]}


INVALID: list[tuple[Body, str]] = [
    ({"cpu": 0}, "cpu"),
    ({"cpu": -1}, "cpu"),
    ({"cpu": "two"}, "cpu"),
    ({"memory": 127}, "memory"),
    ({"memory": 256.5}, "memory"),
    ({"ttl": -1}, "ttl"),
    ({"ttl": 1.5}, "ttl"),
    ({"egress_deny_wait": -1}, "egress_deny_wait"),
    ({"image": 7}, "image"),
    ({"env": {"A": 1}}, "env"),
    ({"env": ["A=1"]}, "env"),
    ({"entrypoint": [1]}, "entrypoint"),
    ({"tty": "yes"}, "tty"),
    ({"events": ["no.such.event"]}, "events[0]"),
    ({"extra_hosts": ["no-colon"]}, "extra_hosts"),
    ({"fs": "x"}, "fs"),
    ({"fs": [{"mount": "/a"}]}, "fs[0].backend"),
    (_fs(backend="floppy"), "fs[0].backend"),
    ({"fs": [{"backend": "local"}]}, "fs[0].mount"),
    (_fs(mount="relative"), "fs[0].mount"),
    ({"fs": [{"backend": "local", "mount": "/a"}, {"backend": "local", "mount": "/a/b"}]}, "fs[1].mount"),
    ({"fs": [{"backend": "local", "mount": "/a"}, {"backend": "local", "mount": "/a"}]}, "fs[1].mount"),
    (_fs(acls=[{"path": "/workspace/**", "access": "maybe"}]), "acls"),
    ({"fs": [{"backend": "s3", "mount": "/a"}]}, "s3_bucket"),
    ({"fs": [{"backend": "gcs", "mount": "/a"}]}, "gcs_bucket"),
    ({"fs": [{"backend": "external", "mount": "/a"}]}, "host"),
    (_rule(access="perhaps"), "egress[0].access"),
    (_rule(host=" "), "egress[0].host"),
    ({"egress": [{"access": "allow"}]}, "egress[0].host"),
    (_rule(ports=[0]), "egress[0].ports[0]"),
    (_rule(ports=[80, 65536]), "egress[0].ports[1]"),
    (_rule(override={"host": "https://x"}), "egress[0].override.host"),
    (_rule(override={"host": "x/y"}), "egress[0].override.host"),
    (_rule(override={"host": "*.x"}), "egress[0].override.host"),
    (_rule(override={"host": "x:99999"}), "egress[0].override.host"),
    (_rule(access="deny", override={"host": "x"}), "egress[0].override.host"),
    (_rule(override={"prefix_path": "mock"}), "egress[0].override.prefix_path"),
    (_rule(override={"prefix_path": "/a?b"}), "egress[0].override.prefix_path"),
    (_rule(override={"body_strategy": "blend"}), "egress[0].override.body_strategy"),
    (_rule(access="deny", override_script="x = 1"), "egress[0].override_script"),
    ({"snapshot": {"files": {"key": "a/b"}}}, "snapshot.files.key"),
    ({"snapshot": {"vm": {"key": ""}}}, "snapshot.vm.key"),
    ({"snapshot": {"files": {"key": "k", "mount": "/not-declared"}}}, "snapshot.files.mount"),
]

SHAPES = [b"", b"{", b"[]", b'"text"', b"7", b"null", b"\xff\xfe", b'{"cpu": 1,}', b"[" * 5000, b'{"cpu": NaN}']

UNSUPPORTED: list[tuple[Body, str]] = [
    ({"fs": [{"backend": "gcs", "mount": "/a", "gcs_bucket": "b", "gcs_service_account_json": "{}"}]}, "fs[0]"),
    ({"fs": [{"backend": "external", "mount": "/a", "host": "ftp://127.0.0.1:9"}]}, "fs[0].host"),
    (_fs(origin="/etc"), "fs[0].origin"),
]  # fmt: skip
"""Well-formed, and not offered, or of no use: refused by name, never silently ignored."""


def _name(value: object) -> str:
    return str(value)[:60]


@pytest.mark.parametrize(("body", "field"), INVALID + UNSUPPORTED, ids=_name)
async def test_create_names_the_field(http: httpx.AsyncClient, new_key: NewKey, body: Body, field: str) -> None:
    key = new_key()
    assert field in error_of(await http.post(f"/v1/sandboxes/{key}", json=body), 400)
    assert field in error_of(await http.put(f"/controller/v1/sandboxes/{key}", json=body), 400)
    assert key not in [entry["key"] for entry in (await http.get("/controller/v1/sandboxes")).json()]


@pytest.mark.parametrize("shape", SHAPES, ids=_name)
async def test_create_needs_an_object(http: httpx.AsyncClient, new_key: NewKey, shape: bytes) -> None:
    if shape == b"":
        pytest.skip("no body at all is the configuration with every default")
    error_of(await http.post(f"/v1/sandboxes/{new_key()}", content=shape), 400)


async def test_put_names_the_field_and_changes_nothing(http: httpx.AsyncClient, new_key: NewKey) -> None:
    ref = await create(http, new_key(), ttl=500)
    before = (await http.get(ref.api("/config"))).json()
    for body, field in INVALID + UNSUPPORTED:
        assert field in error_of(await http.put(ref.api("/config"), json=body), 400), body
    for shape in SHAPES:
        if shape:
            error_of(await http.put(ref.api("/config"), content=shape), 400)
    assert (await http.get(ref.api("/config"))).json() == before


@pytest.mark.parametrize(
    "body", [{"command": 7}, {"command": {}}, {"command": ["a", 1]}, {"env": {"A": 1}}, {"cwd": 1}, []]
)
async def test_exec_checks_its_body(http: httpx.AsyncClient, new_key: NewKey, body: object) -> None:
    ref = await create(http, new_key())
    error_of(await http.post(ref.api("/exec"), json=body), 400)
    error_of(await http.post(ref.api("/exec-stream/e1"), json=body), 400)
    error_of(await http.post(ref.api("/exec"), content=b"{"), 400)


async def test_nul_bytes_are_refused(http: httpx.AsyncClient, new_key: NewKey) -> None:
    """No argument, variable, or path of a process can hold one."""
    ref = await create(http, new_key())
    for body in (
        {"command": "a\0b"},
        {"command": ["a\0b"]},
        {"command": "a", "cwd": "/\0"},
        {"command": "a", "env": {"A": "\0"}},
    ):
        error_of(await http.post(ref.api("/exec"), json=body), 400)
    error_of(await http.get(ref.api("/file/a%00b")), 400)
    error_of(await http.get(ref.api("/directories"), params={"path": "/a\0"}), 400)


async def test_file_calls_check_their_paths(http: httpx.AsyncClient, new_key: NewKey) -> None:
    ref = await create(http, new_key())
    for base in (ref.api("/file"), ref.old_api("/file")):
        error_of(await http.get(base), 400)
        error_of(await http.get(base, params={"path": "relative"}), 400)
        error_of(await http.delete(base), 400)
        error_of(await http.post(base, content=b"x", headers={"content-type": "application/octet-stream"}), 400)
        error_of(await http.post(base, data={"destination": "/workspace"}), 400)
        error_of(await http.post(base, files={"file": ("f", b"x")}), 400)
        error_of(await http.post(base, data={"destination": "x"}, files={"file": ("f", b"x")}), 400)
    error_of(await http.post(ref.api("/file/"), content=b"x"), 400)
    error_of(await http.get(ref.api("/directories")), 400)
    multipart = {"content-type": "multipart/form-data; boundary=x"}
    error_of(await http.post(ref.api("/file"), content=b"--x\r\ngarbage", headers=multipart), 400)


async def test_unknown_sandboxes_are_404_and_named(http: httpx.AsyncClient) -> None:
    unknown = "11111111-2222-4333-8444-555555555555"
    for path in ("ping", "ports", "info", "config", "events", "directories?path=/", "file/workspace/f", "proxy/80/"):
        assert "nobody" in error_of(await http.get(f"/sandbox/{unknown}/v1/nobody/{path}"), 404) or path
        assert "nobody" in error_of(await http.get(f"/sandbox/nobody/v1/{path}"), 404)
    error_of(await http.delete(f"/sandbox/{unknown}/v1/nobody"), 404)
    assert "nobody" in error_of(await http.post("/controller/v1/shutdown/nobody"), 404)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/nothing/here"),
        ("GET", "/v1/sandboxes"),
        ("DELETE", "/controller/v1/sandboxes"),
        ("PUT", "/v1/sandboxes/k"),
        ("GET", "/sandbox"),
        ("GET", "/sandbox/x"),
        ("GET", "/sandbox//v1/"),
        ("GET", "/sandbox/x/v2/y"),
        ("POST", "/controller/v1/shutdown/"),
        ("GET", "/%00"),
        ("GET", "/sandbox/%ff%fe/v1/ping"),
    ],
)
async def test_routing_errors_have_the_error_form(http: httpx.AsyncClient, method: str, path: str) -> None:
    answer = await http.request(method, path)
    assert answer.status_code in {400, 404, 405}
    error_of(answer, answer.status_code)


@pytest.mark.parametrize("key", ["a%20b", "a%2Fb", "x" * 65, "%C3%BC", "..", "%00"])
async def test_keys_are_checked(http: httpx.AsyncClient, key: str) -> None:
    answer = await http.post(f"/v1/sandboxes/{key}", json={})
    assert answer.status_code in {400, 404, 405}, answer.text
    error_of(answer, answer.status_code)


async def test_errors_tell_no_inner_secrets(http: httpx.AsyncClient, new_key: NewKey) -> None:
    answer = await http.post(f"/v1/sandboxes/{new_key()}", json={"image": "/no/such/root"})
    text = error_of(answer, answer.status_code)
    assert "Traceback" not in text
    assert ".py" not in text
