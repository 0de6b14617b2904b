"""How much memory a server takes while something goes on."""

from __future__ import annotations

import asyncio
from typing import Final, Self

import psutil

from support.server import Server

MIB: Final = 1 << 20
GROWTH_BYTES: Final = 64 * MIB
"""What counts as flat."""


class Peak:
    """The server's largest resident size while it is entered."""

    def __init__(self, server: Server) -> None:
        self._process = psutil.Process(server.pid)
        self.before = self.most = self._process.memory_info().rss

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._watch(), name="peak")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            self.most = max(self.most, self._process.memory_info().rss)
            await asyncio.sleep(0.05)

    @property
    def growth(self) -> int:
        return self.most - self.before
