"""Our own OpenAPI document holds what is served, and no request made from it is answered with a 5xx."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, Final

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.core.result import Ok

from contract.raw import create
from support.plain import NOBODY
from support.server import Server

pytestmark = [pytest.mark.contract, pytest.mark.timeout(600)]

SCHEMA_PATH: Final = "/schema/openapi.json"
EXAMPLES_PER_OPERATION: Final = int(os.environ.get("HIVER_TEST_SCHEMA_EXAMPLES", "25"))
MAX_BODY_BYTES_READ: Final = 1 << 20
REQUEST_SECONDS: Final = 10.0

# Registry references would be looked for on the network; the rest of a create is fuzzed.
IMAGES: Final = st.sampled_from(["host", "agent-base", "/no/such/root", "oci:/no/such/layout", "", None, 7])


def fetch_schema(server: Server) -> dict[str, Any]:
    answer = httpx.get(server.url + SCHEMA_PATH)
    assert answer.status_code == 200
    document = answer.json()
    assert isinstance(document, dict)
    return document


@pytest.mark.oci_alone("no sandbox is made")
def test_every_route_of_the_contract_is_described(server: Server) -> None:
    paths = set(fetch_schema(server)["paths"])
    described = " ".join(sorted(paths))
    for part in (
        "/v1/sandboxes/",
        "/controller/v1/sandboxes",
        "/controller/v1/sandboxes/events",
        "/controller/v1/shutdown/",
    ):
        assert part in described
    for operation in ("ping", "ports", "info", "config", "exec", "directories", "events", "file", "snapshot"):
        assert any(path.rstrip("/").endswith(f"/{operation}") for path in paths), operation
    assert any("/exec-stream/" in path and path.endswith("/stdin") for path in paths)


@pytest.mark.oci_alone("no sandbox is made")
def test_bodies_are_described(server: Server) -> None:
    paths = fetch_schema(server)["paths"]
    wanted = {
        ("/v1/sandboxes/{key}", "post"): "entrypoint",
        ("/controller/v1/sandboxes/{key}", "put"): "entrypoint",
        ("/config", "put"): "egress",
        ("/exec", "post"): "command",
        ("/exec-stream/{exec_id}", "post"): "tty",
        ("/stdin", "post"): "data",
        ("/snapshot", "post"): "files",
    }
    for (ending, method), member in wanted.items():
        [operation] = [
            methods[method] for path, methods in paths.items() if path.endswith(ending) and method in methods
        ]
        assert f'"{member}"' in json.dumps(operation.get("requestBody")), (method, ending)
    assert not [path for path in paths if '"format": "uri"' in json.dumps(paths[path])], "paths of files are no URIs"
    for ending in ("/directories", "/{key}/file"):
        [listing] = [methods["get"] for path, methods in paths.items() if path.endswith(ending)]
        assert "path" in [parameter["name"] for parameter in listing["parameters"]]


async def test_no_request_makes_the_server_fail(
    server: Server, http: httpx.AsyncClient, new_key: Callable[[], str]
) -> None:
    ref = await create(http, new_key(), ttl=0)
    known = {"id": ref.id, "sandbox_id": ref.id, "sandbox_ref": ref.id, "key": ref.key}
    schema = schemathesis.openapi.from_dict(fetch_schema(server))
    failures: list[str] = []
    with httpx.Client(base_url=server.url, timeout=REQUEST_SECONDS, verify=NOBODY) as client:
        for result in schema.get_all_operations():
            assert isinstance(result, Ok), result
            failures += _fuzz_operation(client, result.ok(), known)
    for entry in (await http.get("/controller/v1/sandboxes")).json():
        if entry["key"].startswith("fuzz"):
            await http.post(f"/controller/v1/shutdown/{entry['key']}")
    assert not failures, "\n".join(failures[:20])
    assert server.running


def _fuzz_operation(client: httpx.Client, operation: Any, known: dict[str, str]) -> list[str]:
    """Requests that were answered with a 5xx, one line each."""
    failures: list[str] = []

    @seed(20)
    @settings(
        max_examples=EXAMPLES_PER_OPERATION,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(), image=IMAGES, real=st.sampled_from([True, True, False]))
    def attempt(case: Any, image: object, real: bool) -> None:
        _aim(case, image, known if real else {})
        status, text = _send(client, case)
        if status >= 500:
            failures.append(
                f"{status} {case.method} {case.formatted_path} {case.query} {case.body!r:.300}: {text[:300]}"
            )

    try:
        attempt()
    except Unsatisfiable as error:
        raise AssertionError(f"no request can be made for {operation.label}: {error}") from error
    return failures


def _aim(case: Any, image: object, known: dict[str, str]) -> None:
    """Points a generated case at the sandbox that exists, so that it gets past routing."""
    creates = "sandboxes/" in case.path and case.method in {"POST", "PUT"} and "controller/v1/shutdown" not in case.path
    for name in case.path_parameters or {}:
        if creates and name == "key":
            case.path_parameters[name] = "fuzz"
        elif name in known and case.method != "DELETE" and "shutdown" not in case.path:
            case.path_parameters[name] = known[name]
    if creates:
        if isinstance(case.body, dict) and "image" in case.body:
            case.body["image"] = image
        case.headers = {name: value for name, value in (case.headers or {}).items() if name.lower() != "x-hiver-image"}


def _send(client: httpx.Client, case: Any) -> tuple[int, str]:
    """Status and beginning of the answer; an endless stream or a long command is left after a while."""
    arguments = case.as_transport_kwargs(base_url=str(client.base_url))
    content = arguments.get("data")
    if arguments.get("json") is not None:
        content = json.dumps(arguments["json"]).encode()
    try:
        with client.stream(
            arguments["method"],
            arguments["url"],
            params=arguments.get("params"),
            headers=dict(arguments.get("headers") or {}),
            content=content if isinstance(content, str | bytes) else None,
            files=arguments.get("files"),
        ) as response:
            if response.status_code < 500:
                return response.status_code, ""
            return response.status_code, response.read()[:MAX_BODY_BYTES_READ].decode(errors="replace")
    except (httpx.ReadTimeout, httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError, UnicodeError):
        return 0, ""
