"""The end of a sandbox: what is done in which order, and again until nothing of it is left."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from hiverd.contracts.errors import UnavailableError
from hiverd.contracts.isolation import Isolation
from hiverd.files.volumes import Volumes
from hiverd.sandboxes.egress import EgressGates
from hiverd.sandboxes.entrypoints import Entrypoints
from hiverd.sandboxes.file_events import FileEvents
from hiverd.sandboxes.governed import GovernedMounts
from hiverd.sandboxes.sandbox import Sandbox
from hiverd.sandboxes.snapshotting import Snapshots
from hiverd.state.records import Records

log = logging.getLogger(__name__)

DESTROY_RETRY_SECONDS: Final = (0.1, 0.5, 2.0, 5.0, 15.0, 60.0)
AWAY_RETRY_SECONDS: Final = 1.0
"""An engine that is away comes back whole."""
CUT_SECONDS: Final = 2.0
"""After SIGKILL: how long a workload's processes may wait for remote files."""
EVENTS_DRAIN_SECONDS: Final = 1.0
"""How long the end of a sandbox waits for readers of its events."""


class Removal:
    """Of any sandbox, however far it has come."""

    def __init__(
        self,
        *,
        isolation: Isolation,
        volumes: Volumes,
        records: Records,
        entrypoints: Entrypoints,
        egress: EgressGates,
        file_events: FileEvents,
        governed: GovernedMounts,
        snapshots: Snapshots,
        grace_seconds: float,
    ) -> None:
        self._isolation = isolation
        self._volumes = volumes
        self._records = records
        self._entrypoints = entrypoints
        self._egress = egress
        self._file_events = file_events
        self._governed = governed
        self._snapshots = snapshots
        self._grace_seconds = grace_seconds
        self.on_forget: list[Callable[[str], None]] = []
        """Called with a sandbox's id when its workload is being taken down: close what is held open to it."""

    async def remove(self, sandbox: Sandbox) -> None:
        """Returns when nothing is left. While that does not get on, `sandbox.stuck` is set."""
        attempt = 0
        while True:
            try:
                await self._remove(sandbox)
            except UnavailableError as error:
                delay = AWAY_RETRY_SECONDS
                log.warning("shutdown %s: %s; trying again in %s s", sandbox.key, error.message, delay)
                sandbox.stuck_reason = error.message
                sandbox.stuck.set()
            except Exception:
                delay = DESTROY_RETRY_SECONDS[min(attempt, len(DESTROY_RETRY_SECONDS) - 1)]
                log.exception("shutdown %s: not done, trying again in %s s", sandbox.key, delay)
                attempt += 1
            else:
                return
            await asyncio.sleep(delay)

    async def _remove(self, sandbox: Sandbox) -> None:
        await self._records.set_stopping(sandbox.id)
        for session in list(sandbox.execs.values()):
            await session.kill()
        for forget in self.on_forget:
            forget(sandbox.id)
        if sandbox.has_workload:
            async with self._governed.cut_after(sandbox.id, self._grace_seconds + CUT_SECONDS):
                await sandbox.workload.stop(self._grace_seconds)
        await self._entrypoints.forget(sandbox)
        if sandbox.has_lived:
            # Nothing runs any more, and nothing has been removed yet. If this cannot be done, the removal waits.
            await self._snapshots.at_end(sandbox)
            await self._records.set_captured(sandbox.id)
            sandbox.has_lived = False
        self._snapshots.forget(sandbox.id)
        await self._egress.release(sandbox.id)
        await self.take_apart(sandbox)
        await self._file_events.release(sandbox.id)
        await self._volumes.release(sandbox.id)
        await sandbox.events.flushed()
        sandbox.events.close()
        await sandbox.events.drained(EVENTS_DRAIN_SECONDS)
        await self._records.delete(sandbox.id)

    async def take_apart(self, sandbox: Sandbox) -> None:
        """The workload and its mounts; the volume stays. Nothing of it runs."""
        state = None
        if sandbox.has_workload:
            state = sandbox.workload.state
            await sandbox.workload.close()
        await self._isolation.destroy(sandbox.id, state)
        await self._governed.release(sandbox.id)
        sandbox.set_workload(None)
