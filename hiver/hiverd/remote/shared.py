"""What the parts of one folder have in common."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hiverd.clock import Clock
from hiverd.remote.calls import RecordedBackend
from hiverd.remote.nodes import Table
from hiverd.remote.settings import RemoteSettings
from hiverd.remote.tree import Tree

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Shared:
    backend: RecordedBackend
    table: Table
    tree: Tree
    settings: RemoteSettings
    clock: Clock
    loop: asyncio.AbstractEventLoop
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    """Everything that runs on its own; cancelled at the end."""

    def now(self) -> float:
        return self.clock.monotonic()

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """On the loop's thread."""
        task = self.loop.create_task(work, name=name)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """From any other thread: runs it on the loop and waits for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()


class Stopwatch:
    """Real time, whatever the clock of the folder says."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._started
