"""The Docker Engine as a part that fails: restarted, frozen, gone; and what somebody else does to our containers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from support import leaks
from support.docker import IMAGE, Engine, EngineFailed, traces_in
from support.docker_leftovers import processes_naming
from support.leaks import marks_of, wait_until_clean
from support.sandboxes import Box
from support.server import DEFAULT_CONFIG, Backend, Server, ServerFailed, keys_of
from support.waiting import until, until_async

pytestmark = pytest.mark.system

ENGINE_SECONDS: Final = 3
"""How long servers of these tests wait for one answer of the Engine."""
CONFIG: Final = f"{DEFAULT_CONFIG}[docker]\ntimeout_seconds = {ENGINE_SECONDS}\n"


def _started(engine: Engine) -> Engine:
    try:
        engine.start()
    except EngineFailed as error:
        pytest.skip(f"docker cannot be tested here: {error}")
    leaks.engines.append(engine)
    return engine


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """One of the test's own, as it is to be broken; `live-restore` as a parameter."""
    engine = _started(Engine(f"own-{os.getpid()}", live_restore=getattr(request, "param", False)))
    yield engine
    leaks.engines.remove(engine)
    engine.stop()


@pytest.fixture
def server(tmp_path: Path, engine: Engine) -> Iterator[Server]:
    """A server on that Engine, whose sandboxes outlive it. Nothing is left in the end."""
    server = Server(tmp_path, ephemeral=False, config=CONFIG, backend=Backend("docker", engine.host))
    server.start()
    yield server
    engine.thaw()
    server.stop()
    server.ephemeral = True
    server.start()
    server.stop()
    wait_until_clean(marks_of(server.data_dir), seconds=60)


@pytest.fixture
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        yield client


def _ours(engine: Engine) -> list[dict[str, Any]]:
    return [container for container in engine.containers() if "hiver" in json.dumps(container["Labels"])]


def _container_of(engine: Engine, box: Box) -> str:
    (found,) = [str(container["Id"]) for container in engine.containers() if box.id in json.dumps(container)]
    return found


@contextlib.asynccontextmanager
async def _lifecycle(server: Server) -> AsyncIterator[list[str]]:
    """What the lifecycle stream says while the block runs."""
    said: list[str] = []

    async def listen() -> None:
        async with (
            httpx.AsyncClient(base_url=server.url, timeout=60) as client,
            client.stream("GET", "/controller/v1/sandboxes/events") as answer,
        ):
            assert answer.status_code == 200
            async for piece in answer.aiter_text():
                said.append(piece)  # noqa: PERF401 -- as it comes

    task = asyncio.create_task(listen(), name="lifecycle")
    await until_async(_async(lambda: bool(said)), seconds=10, what="the stream begins")
    yield said
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _async(probe: Any) -> Any:
    async def ask() -> bool:
        return bool(probe())

    return ask


def test_an_engine_leaves_nothing_even_after_a_crash() -> None:
    engine = Engine(f"leaves-{os.getpid()}")
    with contextlib.ExitStack() as stack:
        stack.callback(engine.stop)
        _started(engine)
        stack.callback(leaks.engines.remove, engine)
        engine.run_detached(IMAGE, "/bin/sleep", "1000")
        assert leaks.traces([engine.name])
        first = engine.dockerd_pids()
        engine.stop_dockerd(9)
        engine.start()  # cleans first
        assert engine.containers() == []
        assert engine.dockerd_pids() != first
        container = engine.run_detached(IMAGE, "/bin/sleep", "1000")
        assert list(traces_in(engine, [container]))
    wait_until_clean([engine.name])
    assert processes_naming(engine.name) == []
    assert not engine.run_dir.exists()
    assert not engine.data_dir.exists()


@pytest.mark.parametrize("engine", [True], indirect=True, ids=["live-restore"])
async def test_sandboxes_outlive_an_engine_that_keeps_its_containers(
    engine: Engine, server: Server, http: httpx.AsyncClient
) -> None:
    box = await Box.create(http, "k")
    await box.out("sleep 100000 >/dev/null 2>&1 & echo $! > /workspace/pid")
    engine.stop_dockerd(9)
    engine.start_dockerd()
    assert await box.out("kill -0 $(cat /workspace/pid) && echo alive") == "alive\n"
    server.kill()
    engine.stop_dockerd()
    engine.start_dockerd()
    server.start()
    assert await box.out("kill -0 $(cat /workspace/pid) && echo alive") == "alive\n"
    another = await Box.create(http, "another")
    assert await another.out("echo works") == "works\n"


async def test_sandboxes_end_with_an_engine_that_does_not(
    engine: Engine, server: Server, http: httpx.AsyncClient
) -> None:
    box = await Box.create(http, "k")
    async with _lifecycle(server) as said:
        engine.stop_dockerd()
        engine.start_dockerd()
        await until_async(_async(lambda: "k" not in keys_of(server)), seconds=30, what="the sandbox ended")
        await until_async(_async(lambda: any("destroy" in line for line in said)), seconds=10, what="it is told")
    await until_async(_async(lambda: not list(traces_in(engine, [box.id]))), seconds=30, what="its container went")
    again = await Box.create(http, "k")
    assert again.id != box.id
    assert await again.out("echo works") == "works\n"


async def test_a_container_that_somebody_removes(engine: Engine, server: Server, http: httpx.AsyncClient) -> None:
    box = await Box.create(http, "k")
    async with _lifecycle(server) as said:
        engine.call("DELETE", f"/containers/{_container_of(engine, box)}?force=true")
        await until_async(_async(lambda: keys_of(server) == []), seconds=20, what="the sandbox ended")
        for word in ("die", "destroy"):
            await until_async(_async(lambda w=word: any(w in line for line in said)), seconds=10, what=word)
    wait_until_clean([box.id], seconds=30)


async def test_a_frozen_engine_is_a_503_and_is_forgiven(
    engine: Engine, server: Server, http: httpx.AsyncClient
) -> None:
    kept = await Box.create(http, "kept")
    engine.freeze()
    began_monotonic = time.monotonic()
    answer = await http.post("/v1/sandboxes/new", json={})
    assert answer.status_code == 503, answer.text
    assert answer.json()["error"]
    assert time.monotonic() - began_monotonic < 10 * ENGINE_SECONDS
    assert keys_of(server)  # the API does not wait for the Engine
    engine.thaw()
    assert await kept.out("echo works") == "works\n"
    new = await Box.create(http, "new")
    assert await new.out("echo works") == "works\n"
    # What it was asked for while it was deaf, it does after all, and that goes before the next sweep would find it.
    until(lambda: len(_ours(engine)) == 2, seconds=10, what="nothing but the two sandboxes is left")
    folders = server.data_dir / "docker" / "sandboxes"
    until(lambda: {path.name for path in folders.iterdir()} == {kept.id, new.id}, seconds=10, what="its folders went")
    server.stop()
    server.start()
    assert await kept.out("echo works") == "works\n"


async def test_an_engine_that_is_away_is_a_503_until_it_is_back(
    engine: Engine, server: Server, http: httpx.AsyncClient
) -> None:
    engine.stop_dockerd()
    assert (await http.post("/v1/sandboxes/k", json={})).status_code == 503
    engine.start_dockerd()
    box = await Box.create(http, "k")
    assert await box.out("echo works") == "works\n"


async def test_what_no_record_knows_is_swept(engine: Engine, server: Server, http: httpx.AsyncClient) -> None:
    box = await Box.create(http, "forgotten")
    stays = await Box.create(http, "stays")
    server.kill()
    with contextlib.closing(sqlite3.connect(server.data_dir / "hiver.sqlite3")) as database, database:
        database.execute("PRAGMA foreign_keys = ON")
        assert database.execute("DELETE FROM sandboxes WHERE id = ?", [box.id]).rowcount == 1
    server.start()
    until(lambda: not list(traces_in(engine, [box.id])), seconds=30, what="its container went")
    assert list(traces_in(engine, [stays.id]))
    assert keys_of(server) == ["stays"]
    assert await stays.out("echo works") == "works\n"


def test_a_server_without_its_engine_says_so(tmp_path: Path) -> None:
    backend = Backend("docker", f"unix://{tmp_path}/nobody.sock")
    server = Server(tmp_path / "server", config=CONFIG, backend=backend)
    with pytest.raises(ServerFailed) as caught:
        server.start()
    assert "nobody.sock" in str(caught.value)
    assert server.stop() == 1
    assert not any(Path("/run/hiver", mark).exists() for mark in marks_of(server.data_dir) if "/" not in mark)
