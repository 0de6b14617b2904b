"""Plain HTTP helpers for requests that no Python client makes: other languages' clients, and malformed ones."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True)
class Ref:
    """A created sandbox."""

    id: str
    key: str

    def api(self, path: str = "") -> str:
        """A URL path in the new family's form."""
        return f"/sandbox/{self.id}/v1/{self.key}{path}"

    def old_api(self, path: str = "") -> str:
        """A URL path in the old family's form."""
        return f"/sandbox/{self.key}/v1{path}"


async def create(http: httpx.AsyncClient, key: str, **config: Any) -> Ref:
    """Creates a sandbox as the newest client would; the answer must be 201."""
    answer = await http.post(f"/v1/sandboxes/{key}", json=config, headers={"x-hiver-key": key})
    assert answer.status_code == 201, answer.text
    return Ref(answer.json()["id"], answer.json()["key"])


def error_of(answer: httpx.Response, status: int) -> str:
    """The text of an error answer, whose form and status are checked (PROTOCOL 2, 0.18)."""
    assert answer.status_code == status, (
        f"{answer.request.method} {answer.request.url}: {answer.status_code} {answer.text}"
    )
    document = answer.json()
    assert isinstance(document, dict)
    assert set(document) <= {"error", "details"}, document
    assert isinstance(document["error"], str)
    assert document["error"].strip()
    assert isinstance(document.get("details", {}), dict)
    return str(document["error"])


@dataclass(frozen=True)
class Frame:
    """One frame of an event stream as received."""

    id: str | None
    event: str | None
    data: Any


class SseReader:
    """Frames of a response in order. Comments count in `comments`; the longest line in `longest_line_bytes`."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.comments = 0
        self.longest_line_bytes = 0
        self.received = bytearray()

    async def frames(self) -> AsyncIterator[Frame]:
        pending = b""
        async for piece in self.response.aiter_raw():
            self.received += piece
            pending += piece
            *blocks, pending = pending.split(b"\n\n")
            for block in blocks:
                frame = self._parse(block)
                if frame is not None:
                    yield frame

    def _parse(self, block: bytes) -> Frame | None:
        fields: dict[str, str] = {}
        for line in block.split(b"\n"):
            self.longest_line_bytes = max(self.longest_line_bytes, len(line))
            if line.startswith(b":"):
                self.comments += 1
                continue
            name, _, value = line.decode("ascii").partition(":")
            fields[name] = value.removeprefix(" ")
        if "data" not in fields:
            return None
        return Frame(fields.get("id"), fields.get("event"), json.loads(fields["data"]))


@asynccontextmanager
async def stream(http: httpx.AsyncClient, method: str, path: str, **options: Any) -> AsyncIterator[SseReader]:
    """Opens an event stream; the answer must be one, with the headers of PROTOCOL 3.3 and 3.14."""
    async with http.stream(method, path, timeout=httpx.Timeout(10, read=30), **options) as response:
        if response.status_code != 200:
            await response.aread()
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].split(";")[0] == "text/event-stream"
        yield SseReader(response)
