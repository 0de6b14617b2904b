"""The core of the server on a fake isolation plug-in and a real database."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from hiverd.clock import SystemClock
from hiverd.contracts.isolation import BackendContext
from hiverd.contracts.snapshot import SnapshotStore
from hiverd.egress.dialer import Dialer
from hiverd.egress.own_api import OwnApi
from hiverd.egress.script_pool import ScriptPool
from hiverd.fuse.frames import RemoteOptions
from hiverd.sandboxes.apply import ConfigApplier
from hiverd.sandboxes.egress import EgressGates
from hiverd.sandboxes.entrypoints import Entrypoints
from hiverd.sandboxes.execs import ExecLimits, Execs
from hiverd.sandboxes.file_events import FileEvents
from hiverd.sandboxes.governed import GovernedMounts
from hiverd.sandboxes.housekeeping import Housekeeping
from hiverd.sandboxes.manager import Manager, ManagerLimits
from hiverd.sandboxes.mounting import Mounting
from hiverd.sandboxes.mounts import MountPlanner
from hiverd.sandboxes.removal import Removal
from hiverd.sandboxes.sandbox import Sandbox
from hiverd.sandboxes.snapshot_stores import SnapshotStores, open_store
from hiverd.sandboxes.snapshotting import Snapshots
from hiverd.sandboxes.specs import SpecBuilder, SpecDefaults
from hiverd.sandboxes.stdio import StdioLimits
from hiverd.sandboxes.tasks import TaskGroup
from hiverd.settings import SnapshotsSettings
from hiverd.state.database import Database
from hiverd.state.journal import Journal
from hiverd.state.records import Records
from hiverd.testing.fakes import FakeIsolation
from hiverd.wire.config import SandboxConfig

SPEC_DEFAULTS = SpecDefaults(image="host", cpu=1.0, memory_mib=512, pids_max=64, gateway_url="http://gateway:10000")


class MovableClock(SystemClock):
    """Real time plus what a test adds."""

    def __init__(self) -> None:
        self.added_seconds = 0.0

    def wall(self) -> float:
        return super().wall() + self.added_seconds

    def monotonic(self) -> float:
        return super().monotonic() + self.added_seconds


class PlainVolumes:
    """Folders without a limit; what `hiverd.files.volumes.Volumes` is to the manager."""

    def __init__(self, root: Path) -> None:
        self.root = root

    async def allocate(self, sandbox_id: str, slot: int) -> Path:
        volume = self.root / sandbox_id
        volume.mkdir(parents=True)
        return volume

    async def adopt(self, sandbox_id: str) -> None:
        pass

    async def release(self, sandbox_id: str) -> None:
        shutil.rmtree(self.root / sandbox_id, ignore_errors=True)

    async def list_owned(self) -> frozenset[str]:
        return frozenset(path.name for path in self.root.iterdir()) if self.root.exists() else frozenset()


class Core:
    """One server's worth of parts. `crash` drops them as `kill -9` would; the plug-in's workloads live on."""

    def __init__(
        self, database: Database, isolation: FakeIsolation, volumes: PlainVolumes, store: SnapshotStore
    ) -> None:
        limits = StdioLimits(lines_per_second=1000, bytes_per_second=1 << 20)
        self.clock = MovableClock()
        self.database = database
        self.isolation = isolation
        self.volumes = volumes
        self.records = Records(database)
        self.journal = Journal(database, self.clock, max_count=500, max_bytes=1 << 20)
        self.tasks = TaskGroup()
        self.planner = MountPlanner((), environ={})
        base = volumes.root.parent
        remote = RemoteOptions(cache_bytes=1 << 26, uploads=4)
        self.governed = GovernedMounts(base / "mounts", base / "remote", remote, 1.0, self.tasks)
        self.mounting = Mounting(self.planner, self.governed)
        self.egress_folder = volumes.root.parent / "egress"
        dialer = Dialer(OwnApi("127.0.0.1", 10000), {})
        self.egress = EgressGates(self.egress_folder, dialer, ScriptPool(), "allow")
        file_events = FileEvents(volumes.root)
        self.applier = ConfigApplier(
            records=self.records,
            planner=self.planner,
            mounting=self.mounting,
            governed=self.governed,
            egress=self.egress,
            file_events=file_events,
            default_egress="allow",
        )
        settings = SnapshotsSettings(path=base / "snapshots")
        self.snapshot_stores = SnapshotStores(store, settings, self.planner, base / "spool")
        self.snapshots = Snapshots(
            isolation=isolation,
            stores=self.snapshot_stores,
            settings=settings,
            data_dir=base,
            ready=self.mounting.serve_ended,
        )
        self.execs = Execs(self.journal, self.clock, ExecLimits(max_output_bytes=1024, stdio=limits))
        entrypoints = Entrypoints(self.journal, self.clock, limits, self.tasks)
        removal = Removal(
            isolation=isolation,
            volumes=volumes,  # type: ignore[arg-type]
            records=self.records,
            entrypoints=entrypoints,
            egress=self.egress,
            file_events=file_events,
            governed=self.governed,
            snapshots=self.snapshots,
            grace_seconds=0.1,
        )
        self.manager = Manager(
            isolation=isolation,
            volumes=volumes,  # type: ignore[arg-type]
            records=self.records,
            journal=self.journal,
            specs=SpecBuilder(SPEC_DEFAULTS, self.mounting),
            file_events=file_events,
            egress=self.egress,
            governed=self.governed,
            snapshots=self.snapshots,
            removal=removal,
            entrypoints=entrypoints,
            clock=self.clock,
            tasks=self.tasks,
            reconcile=self.applier.reconcile,
            revive=self.applier.revive,
            missing=self.mounting.missing,
            limits=ManagerLimits(max_sandboxes=20, create_timeout_seconds=5, default_ttl_seconds=1800),
        )
        self.housekeeping = Housekeeping(
            manager=self.manager,
            isolation=isolation,
            volumes=volumes,  # type: ignore[arg-type]
            egress=self.egress,
            governed=self.governed,
            snapshots=self.snapshots,
            records=self.records,
            clock=self.clock,
            tasks=self.tasks,
            usage_seconds=5,
        )

    async def obtain(self, key: str, read: Callable[[], SandboxConfig]) -> tuple[Sandbox, bool]:
        """`get_or_create` with a configuration that is at hand."""

        async def read_config() -> SandboxConfig:
            return read()

        return await self.manager.get_or_create(key, read_config)


OpenCore = Callable[..., Any]


@pytest.fixture
def isolation(tmp_path: Path) -> FakeIsolation:
    return FakeIsolation(
        BackendContext(instance="test0000", data_dir=tmp_path, run_dir=tmp_path, options={}, image_aliases={})
    )


@pytest.fixture
def open_core(tmp_path: Path, isolation: FakeIsolation) -> OpenCore:
    """Opens a core on the test's database; opening again is a restart of the server."""

    @asynccontextmanager
    async def open_one() -> AsyncIterator[Core]:
        database = await Database.open(tmp_path / "test.sqlite3")
        store = await open_store(SnapshotsSettings(path=tmp_path / "snapshots"), "test0000")
        core = Core(database, isolation, PlainVolumes(tmp_path / "volumes"), store)
        await core.journal.start()
        try:
            yield core
        finally:
            await core.tasks.close()
            core.snapshot_stores.close()
            await store.close()
            await core.journal.close()
            await database.close()

    return open_one
