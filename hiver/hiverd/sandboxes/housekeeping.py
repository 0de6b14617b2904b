"""What the server does by itself: reap the idle, sweep up orphans, sample resource usage, store signs of life."""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import Final

from msgspec import Struct

from hiverd.clock import Clock
from hiverd.contracts.errors import SandboxGoneError
from hiverd.contracts.isolation import Isolation, Usage
from hiverd.files.volumes import Volumes
from hiverd.sandboxes.egress import EgressGates
from hiverd.sandboxes.governed import GovernedMounts
from hiverd.sandboxes.manager import Manager
from hiverd.sandboxes.sandbox import Sandbox
from hiverd.sandboxes.snapshotting import Snapshots
from hiverd.sandboxes.tasks import TaskGroup
from hiverd.state.records import Records
from hiverd.wire.events import ResourceUsageEvent

log = logging.getLogger(__name__)

TICK_SECONDS: Final = 1.0
LEASE_SECONDS: Final = 3.0
SWEEP_SECONDS: Final = 60.0


class _Sample(Struct, frozen=True):
    usage: Usage
    at_monotonic: float
    shown: tuple[float, int]


class Housekeeping:
    def __init__(
        self,
        *,
        manager: Manager,
        isolation: Isolation,
        volumes: Volumes,
        egress: EgressGates,
        governed: GovernedMounts,
        snapshots: Snapshots,
        records: Records,
        clock: Clock,
        tasks: TaskGroup,
        usage_seconds: float,
    ) -> None:
        self._manager = manager
        self._isolation = isolation
        self._volumes = volumes
        self._egress = egress
        self._governed = governed
        self._snapshots = snapshots
        self._records = records
        self._clock = clock
        self._tasks = tasks
        self._usage_seconds = usage_seconds
        self._owner = str(uuid.uuid4())
        self._stored_activity: dict[str, float] = {}
        self._samples: dict[str, _Sample] = {}

    def start(self) -> None:
        self._tasks.start(self._every(TICK_SECONDS, self.reap), name="reaper")
        self._tasks.start(self._every(SWEEP_SECONDS, self.sweep), name="sweep")
        self._tasks.start(self._every(SWEEP_SECONDS, self._snapshots.offer_again), name="snapshots-kept-aside")
        self._tasks.start(self._snapshots.offer_again(), name="snapshots-kept-aside-at-start")
        if self._usage_seconds > 0:
            self._tasks.start(self._every(self._usage_seconds, self.sample), name="usage")

    async def _every(self, seconds: float, work: object) -> None:
        assert callable(work)  # noqa: S101
        while True:
            await asyncio.sleep(seconds)
            try:
                await work()
            except Exception:
                log.exception("housekeeping failed, trying again in %s s", seconds)

    async def reap(self) -> None:
        """Ends sandboxes whose TTL has passed. Under a lease, so that one server per database does it."""
        await self.store_activity()
        if not await self._records.take_lease("reaper", self._owner, self._clock.wall(), LEASE_SECONDS):
            return
        for sandbox in self._manager.all():
            if sandbox.status == "running" and sandbox.expired:
                log.info("sandbox %s was idle for its whole ttl", sandbox.key)
                self._tasks.start(self._manager.shutdown(sandbox, expired=True), name=f"expire-{sandbox.key}")

    async def store_activity(self) -> None:
        now = {s.id: s.last_activity_at for s in self._manager.all() if s.status == "running"}
        changed = {sandbox_id: at for sandbox_id, at in now.items() if self._stored_activity.get(sandbox_id) != at}
        if changed:
            await self._records.set_activity(changed)
        self._stored_activity = now

    async def sweep(self) -> None:
        """Removes what bears our mark and belongs to no record: the remains of crashes. Brings back what should be."""
        found = frozenset().union(
            await self._isolation.list_owned(),
            await self._governed.list_owned(),
            await self._volumes.list_owned(),
            await self._egress.list_owned(),
        )
        # Read after the listing: whatever was created meanwhile is known before it exists on the host.
        for sandbox_id in found - self._manager.owned_ids():
            log.warning("sweep: removing what is left of sandbox %s", sandbox_id)
            try:
                await self._isolation.destroy(sandbox_id, None)
                await self._governed.release(sandbox_id)
                await self._volumes.release(sandbox_id)
                await self._egress.release(sandbox_id)
            except Exception:
                log.exception("sweep: sandbox %s could not be removed", sandbox_id)
        await self._manager.open_gates()
        await self._manager.revive_mounts()

    async def sample(self) -> None:
        sandboxes = [s for s in self._manager.all() if s.ready and s.events.wants(ResourceUsageEvent)]
        await asyncio.gather(*(self._sample_one(sandbox) for sandbox in sandboxes))
        alive = {sandbox.id for sandbox in sandboxes}
        self._samples = {sandbox_id: s for sandbox_id, s in self._samples.items() if sandbox_id in alive}

    async def _sample_one(self, sandbox: Sandbox) -> None:
        try:
            usage = await sandbox.workload.usage()
        except SandboxGoneError:
            return
        except Exception:
            log.exception("usage of sandbox %s could not be read", sandbox.key)
            return
        now = self._clock.monotonic()
        before = self._samples.get(sandbox.id)
        shown = (_cpu_percent(before, usage, now), usage.memory_bytes)
        self._samples[sandbox.id] = _Sample(usage, now, shown)
        if before is None or shown != before.shown:
            sandbox.events.emit(ResourceUsageEvent(cpu_percent=shown[0], memory_bytes=shown[1]))

    async def close(self) -> None:
        await self.store_activity()
        await self._records.drop_lease("reaper", self._owner)


def _cpu_percent(before: _Sample | None, usage: Usage, now_monotonic: float) -> float:
    """Of one CPU, since the sample before; 100 is one CPU busy all the time."""
    if before is None or now_monotonic <= before.at_monotonic:
        return 0.0
    busy = usage.cpu_seconds - before.usage.cpu_seconds
    return round(max(0.0, busy) / (now_monotonic - before.at_monotonic) * 100, 1)
