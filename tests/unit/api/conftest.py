"""The whole HTTP side over a fake isolation plug-in, on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvicorn

from hiverd.api.transfers import DirectProtocol
from hiverd.services import Services
from hiverd.settings import load_settings
from hiverd.testing.fakes import FakeIsolation
from hiverd.web import build_asgi
from support.plain import plain_client


class Running:
    def __init__(self, services: Services, base_url: str) -> None:
        self.services = services
        self.base_url = base_url
        self.client = plain_client(base_url=base_url, timeout=10)

    @property
    def isolation(self) -> FakeIsolation:
        assert isinstance(self.services.isolation, FakeIsolation)
        return self.services.isolation

    async def create(self, key: str = "k", **config: object) -> str:
        """The new-family base path of a sandbox."""
        answer = await self.client.post(f"/v1/sandboxes/{key}", json=config)
        assert answer.status_code in {200, 201}, answer.text
        return f"/sandbox/{answer.json()['id']}/v1/{key}"


@pytest.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    settings = load_settings(
        None,
        environ={},
        overrides={
            "server.data_dir": str(tmp_path / "data"),
            "server.run_dir": str(tmp_path / "run"),
            "server.ephemeral": True,
            "files.volume": "plain",
            "exec.max_output_bytes": 2048,
        },
    )
    # Nothing is watched here, and nothing needs a process to serve it.
    monkeypatch.setattr(Services, "_watchable", lambda _: True)
    services = Services(settings, FakeIsolation)
    await services.start()
    config = uvicorn.Config(
        build_asgi(services),
        port=0,
        http=DirectProtocol,
        ws="wsproto",
        lifespan="off",
        log_config=None,
        access_log=False,
    )
    web = uvicorn.Server(config)
    serving = asyncio.create_task(web.serve())
    while not web.started:
        await asyncio.sleep(0.01)
    port = web.servers[0].sockets[0].getsockname()[1]
    running = Running(services, f"http://127.0.0.1:{port}")
    try:
        yield running
    finally:
        await running.client.aclose()
        web.should_exit = True
        await serving
        await services.stop()
