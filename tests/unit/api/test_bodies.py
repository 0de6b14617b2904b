"""Large bodies are judged off the event loop's thread, with the same outcome."""

from __future__ import annotations

import json
import threading

import pytest

from hiverd.api.bodies import INLINE_BYTES, judged
from hiverd.contracts.errors import InvalidError


@pytest.mark.parametrize(("size", "inline"), [(0, True), (INLINE_BYTES, True), (INLINE_BYTES + 1, False)])
async def test_who_judges(size: int, inline: bool) -> None:
    judge = await judged(b" " * size, lambda _: threading.get_ident())
    assert (judge == threading.get_ident()) is inline


@pytest.mark.parametrize("size", [1, INLINE_BYTES + 1])
async def test_refusals_come_through(size: int) -> None:
    def refuse(raw: bytes) -> None:
        raise InvalidError(f"{len(raw)} bytes", field="x")

    with pytest.raises(InvalidError, match=str(size)):
        await judged(b" " * size, refuse)


async def test_a_large_configuration_is_an_ordinary_one(server):
    rules = [{"access": "allow", "host": f"h{number}.example.org", "paths": ["/" + "p" * 80]} for number in range(4000)]
    base = await server.create("large", egress=rules)
    assert len(json.dumps(rules)) > INLINE_BYTES
    applied = await server.client.put(f"{base}/config", json={"egress": rules[1:]})
    assert applied.json()["applied"], applied.text
    refused = await server.client.put(f"{base}/config", json={"egress": [*rules, {"access": "allow", "host": " "}]})
    assert (refused.status_code, refused.json()["error"]) == (400, "egress[4000].host is required")
