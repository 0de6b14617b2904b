"""What the Engine was asked for while it did not answer, it does when it wakes: a container that nobody waits for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from hiverd.contracts.errors import HiverError, UnavailableError

_AGAIN_SECONDS: Final = 1.0
_ROUNDS: Final = 5
"""After the first answer: a request that waited with ours may be served after it."""

log = logging.getLogger(__name__)


class Afterwards:
    """Removes sandboxes as soon as the Engine answers again. What it gives up is left to the core's sweep."""

    def __init__(self, destroy: Callable[[str], Awaitable[None]]) -> None:
        """`destroy` is idempotent, and raises `UnavailableError` while the Engine does not answer."""
        self._destroy = destroy
        self._tasks: set[asyncio.Task[None]] = set()

    def remove(self, sandbox_id: str) -> None:
        """Returns at once."""
        task = asyncio.create_task(self._remove(sandbox_id), name=f"remove {sandbox_id} afterwards")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Gives up."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _remove(self, sandbox_id: str) -> None:
        rounds = 0
        while rounds < _ROUNDS:
            await asyncio.sleep(_AGAIN_SECONDS if rounds else 0)
            try:
                await self._destroy(sandbox_id)
                rounds += 1
            except UnavailableError:
                await asyncio.sleep(_AGAIN_SECONDS)
            except HiverError as error:
                log.warning("sandbox %s is left to the sweep: %s", sandbox_id, error.message)
                return
