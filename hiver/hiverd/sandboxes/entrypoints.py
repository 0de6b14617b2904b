"""What the core does with a sandbox's entrypoint: records its output, shows its terminal, notices an early end."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from hiverd.clock import Clock
from hiverd.contracts.errors import BackendError
from hiverd.contracts.isolation import Workload
from hiverd.sandboxes.sandbox import Sandbox
from hiverd.sandboxes.stdio import StdioLimits, StdioRecorder
from hiverd.sandboxes.tasks import TaskGroup
from hiverd.sandboxes.terminals import TerminalHub
from hiverd.state.journal import Journal

log = logging.getLogger(__name__)

SETTLE_SECONDS: Final = 0.15
"""How long an entrypoint must live for the creation to count as a success (PROTOCOL 3.1)."""
TAIL_BYTES: Final = 4 << 10
DRAIN_SECONDS: Final = 2.0


class Entrypoints:
    def __init__(self, journal: Journal, clock: Clock, limits: StdioLimits, tasks: TaskGroup) -> None:
        self._journal = journal
        self._clock = clock
        self._limits = limits
        self._tasks = tasks
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._positions: dict[str, str | None] = {}

    async def settle(self, sandbox: Sandbox) -> None:
        """Raises `BackendError` with the end of its output if the entrypoint ends at once."""
        if sandbox.spec is None or not sandbox.spec.argv or sandbox.spec.tty:
            return
        try:
            outcome = await asyncio.wait_for(sandbox.workload.wait(), SETTLE_SECONDS)
        except TimeoutError:
            return
        tail = await _tail(sandbox.workload)
        raise BackendError(
            f"the entrypoint {sandbox.spec.argv[0]!r} ended at once with exit code {outcome.exit_code}"
            + (f": {tail}" if tail else "")
        )

    def resume(self, sandbox: Sandbox, position: str | None) -> None:
        """After a restart: recording goes on behind what the journal already holds."""
        self._positions[sandbox.id] = position

    def follow(self, sandbox: Sandbox, workload: Workload) -> None:
        terminal = workload.terminal()
        if terminal is not None:
            sandbox.terminal = TerminalHub(terminal)
        elif sandbox.spec is not None and sandbox.spec.argv:
            task = self._tasks.start(self._record(sandbox, workload), name=f"stdio-{sandbox.key}")
            self._followers[sandbox.id] = task

    async def forget(self, sandbox: Sandbox) -> None:
        """The workload has ended: takes in the rest of its output, then lets go."""
        if sandbox.terminal is not None:
            await sandbox.terminal.close()
        self._positions.pop(sandbox.id, None)
        task = self._followers.pop(sandbox.id, None)
        if task is not None:
            await asyncio.wait({task}, timeout=DRAIN_SECONDS)
            task.cancel()
            await asyncio.wait({task})

    async def _record(self, sandbox: Sandbox, workload: Workload) -> None:
        recorder = StdioRecorder(sandbox.events, self._limits, self._clock)
        async for chunk in workload.entrypoint_output(self._positions.pop(sandbox.id, None)):
            recorder.feed(chunk.stream, chunk.data)
            if not recorder.has_partial_line:
                # A server that dies now reads an unfinished line again from its beginning.
                sandbox.events.set_log_position(chunk.position)
            await self._journal.room()
        recorder.finish()


async def _tail(workload: Workload) -> str:
    data = b""
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            async for chunk in workload.entrypoint_output(None):
                data = (data + chunk.data)[-TAIL_BYTES:]
    except TimeoutError:
        pass
    return data.decode("utf-8", "replace").strip()
