"""A server that trusts the tests' authority, and upstreams on this host's loopback."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

import httpx
import pytest

from support.clients import CLIENTS
from support.leaks import marks_of, wait_until_clean
from support.plain import plain_client
from support.server import DEFAULT_CONFIG, Backend, Server
from support.upstreams import Authority, HttpUpstream


class Inside:
    """One sandbox and what is recorded of it."""

    def __init__(self, client: httpx.AsyncClient, sandbox_id: str, key: str) -> None:
        self._client = client
        self.id = sandbox_id
        self.key = key
        self.base = f"/sandbox/{sandbox_id}/v1/{key}"

    async def run(self, command: str | list[str], **more: Any) -> Output:
        """Runs a command (a string: by `sh -c`) to its end."""
        answer = await self._client.post(f"{self.base}/exec", json={"command": command, **more}, timeout=120)
        answer.raise_for_status()
        return Output(**answer.json())

    async def write(self, path: str, content: str | bytes) -> None:
        """Writes a file."""
        data = content.encode() if isinstance(content, str) else content
        answer = await self._client.post(f"{self.base}/file{path}", content=data)
        answer.raise_for_status()

    async def apply(self, **members: Any) -> None:
        """Replaces the configuration."""
        answer = await self._client.put(f"{self.base}/config", json=members)
        assert answer.json()["applied"], answer.text

    async def events(self, kind: str = "egress.") -> list[dict[str, Any]]:
        """All events so far whose type begins like this."""
        answer = await self._client.get(f"{self.base}/events", params={"follow": "false"})
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        return [event for event in map(json.loads, lines) if event["type"].startswith(kind)]


class Output(NamedTuple):
    stdout: str
    stderr: str
    exit_code: int


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def egress_server(
    tmp_path_factory: pytest.TempPathFactory, authority: Authority, isolated_by: Backend
) -> Iterator[Server]:
    CLIENTS.mkdir(exist_ok=True)
    config = f'{DEFAULT_CONFIG}[files]\norigin_roots = ["{CLIENTS}"]\n{authority.settings}'
    server = Server(tmp_path_factory.mktemp("egress"), config=config, backend=isolated_by)
    with server:
        marks = marks_of(server.data_dir)
        yield server
        assert server.running, f"the server ended during the tests\n{server.log_tail()}"
    wait_until_clean(marks)


@pytest.fixture
async def sandboxes(egress_server: Server) -> AsyncIterator[Any]:
    """`await sandboxes(egress=[...])` makes a sandbox with that configuration, which ends with the test."""
    async with plain_client(base_url=egress_server.url, timeout=60) as client:
        made: list[Inside] = []

        async def make(**config: Any) -> Inside:
            key = f"e-{uuid.uuid4().hex[:12]}"
            answer = await client.post(f"/v1/sandboxes/{key}", json=config)
            assert answer.status_code == 201, answer.text
            made.append(Inside(client, answer.json()["id"], key))
            return made[-1]

        yield make
        for sandbox in made:
            await client.delete(sandbox.base)


@pytest.fixture
def plain() -> Iterator[HttpUpstream]:
    """An upstream without TLS."""
    with HttpUpstream() as upstream:
        yield upstream


@pytest.fixture
def secure(authority: Authority) -> Iterator[HttpUpstream]:
    """An upstream with TLS, for the name api.test."""
    with HttpUpstream(authority.context("api.test")) as upstream:
        yield upstream
