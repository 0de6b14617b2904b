"""What an agent reaches over HTTP, with and without TLS, and what is on record of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.upstreams import HttpUpstream, lead

pytestmark = pytest.mark.system


async def test_an_allowed_request_arrives_with_a_secret_that_the_agent_never_sees(
    sandboxes: Any, secure: HttpUpstream
) -> None:
    rule = lead("api.test", secure, override={"headers": {"authorization": "Bearer tell-nobody"}})
    sandbox = await sandboxes(egress=[rule])
    output = await sandbox.run("curl -sS https://api.test/a?b=c")
    assert output.exit_code == 0, output
    assert secure.seen[0].header("authorization") == "Bearer tell-nobody"
    request, response, chunk = await sandbox.events()
    assert (request["host"], request["path"], request["query"]) == ("api.test", "/a", "b=c")
    assert (request["access"], request["upstream"], response["status"]) == ("allowed", secure.address, 200)
    assert response["request_id"] == chunk["request_id"] == request["id"]
    assert "tell-nobody" not in json.dumps([request, response, chunk])


async def test_what_no_rule_allows_is_refused_and_recorded(sandboxes: Any, plain: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", plain, methods=["GET"])])
    output = await sandbox.run("curl -sS -i -X POST http://api.test/; curl -sS -i http://other.test/")
    assert output.stdout.count("HTTP/1.1 403 Forbidden") == 2
    assert "other.test" in output.stdout
    assert plain.seen == []
    events = await sandbox.events()
    assert [event.get("access") for event in events] == ["denied", None, "denied", None]
    assert [event.get("status") for event in events] == [None, 403, None, 403]
