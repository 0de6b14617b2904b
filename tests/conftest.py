"""Fixtures for every kind of test: a server in a process of its own, and checks that nothing is left of it."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from support.leaks import marks_of, wait_until_clean
from support.server import Server

MakeServer = Callable[..., Server]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One `hiver serve --ephemeral` for all tests of this worker. Nothing may be left of it."""
    server = Server(tmp_path_factory.mktemp("server"))
    with server:
        marks = marks_of(server.data_dir)
        yield server
        assert server.running, f"the server ended during the tests\n{server.log_tail()}"
    wait_until_clean(marks)


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[MakeServer]:
    """Builds further servers, not started. When the test ends, all sandboxes go, also those that were to outlive their
    server, and nothing may be left."""
    made: list[Server] = []

    def make(**options: object) -> Server:
        server = Server(tmp_path / f"server{len(made)}", **options)  # type: ignore[arg-type]
        made.append(server)
        return server

    yield make
    for server in made:
        _end(server)


def _end(server: Server) -> None:
    """Stops a server and, through a last ephemeral start on its data folder, whatever it left running on purpose."""
    server.stop()
    if not server.ephemeral:
        server.ephemeral = True
        server.start()
        server.stop()
    wait_until_clean(marks_of(server.data_dir))


@pytest.fixture
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    """A plain HTTP client on the server."""
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
        yield client


@pytest.fixture
async def new_key(http: httpx.AsyncClient) -> AsyncIterator[Callable[[], str]]:
    """Names for sandboxes; those that exist when the test ends are removed."""
    keys: list[str] = []

    def make() -> str:
        keys.append(f"t-{uuid.uuid4().hex[:12]}")
        return keys[-1]

    yield make
    for key in keys:
        await http.post(f"/controller/v1/shutdown/{key}")
