"""Egress sessions in the test's process, on the event loop that the server uses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import uvloop

from support.egress import Rig
from support.upstreams import Authority, HttpUpstream

MakeRig = Callable[..., Any]


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def upstream_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
async def make_rig(tmp_path: Path, upstream_authority: Authority) -> AsyncIterator[MakeRig]:
    """`await make_rig(rules, **options)`: a sandbox's way out, checked for what it leaves when the test ends."""
    async with AsyncExitStack() as stack:

        async def make(*rules: dict[str, Any], **options: Any) -> Rig:
            return await stack.enter_async_context(Rig(tmp_path, rules, upstream_ca=upstream_authority.path, **options))

        yield make


@pytest.fixture
def plain() -> Iterator[HttpUpstream]:
    """An upstream without TLS."""
    with HttpUpstream() as upstream:
        yield upstream


@pytest.fixture
def secure(upstream_authority: Authority) -> Iterator[HttpUpstream]:
    """An upstream with TLS, for the name api.test."""
    with HttpUpstream(upstream_authority.context("api.test")) as upstream:
        yield upstream
