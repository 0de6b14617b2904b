"""Everything with a life of its own: built, started in order and stopped in reverse."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import IO

from hiverd import choosing
from hiverd.clock import SystemClock
from hiverd.contracts.errors import UnavailableError
from hiverd.contracts.isolation import BackendContext, Isolation
from hiverd.egress import gate
from hiverd.egress.dialer import Dialer
from hiverd.egress.own_api import GATEWAY_NAME, own_api
from hiverd.egress.script_pool import ScriptPool
from hiverd.egress.upstream_tls import client_context
from hiverd.files.access import FileAccess
from hiverd.files.volumes import Volumes
from hiverd.fuse.frames import RemoteOptions
from hiverd.gateway.gateway import Gateway
from hiverd.netns import ThreadSocketFactory
from hiverd.plugins import isolation_class
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
from hiverd.sandboxes.snapshot_stores import SnapshotStores, open_store
from hiverd.sandboxes.snapshotting import Snapshots
from hiverd.sandboxes.specs import SpecBuilder, SpecDefaults
from hiverd.sandboxes.stdio import StdioLimits
from hiverd.sandboxes.tasks import TaskGroup
from hiverd.settings import Settings
from hiverd.state.database import Database
from hiverd.state.journal import Journal
from hiverd.state.records import Records


class Services:
    """Everything with a life of its own, started in order and stopped in reverse, also after a partial start."""

    def __init__(self, settings: Settings, isolation: type[Isolation] | None = None) -> None:
        """`isolation` is for tests; otherwise the settings name the plug-in."""
        self.settings = settings
        self._isolation_class = isolation
        self.clock = SystemClock()
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            _remove_empty_run_folders(self.settings)
            raise

    async def _start(self) -> None:
        settings, stack = self.settings, self._stack
        data_dir = settings.server.data_dir
        _private_folder(data_dir)
        stack.callback(_take_data_dir(data_dir).close)
        database = await Database.open(data_dir / "hiver.sqlite3")
        stack.push_async_callback(database.close)
        # Before anything is made: settings that cannot be are told, and nothing is left.
        self.snapshot_store = await open_store(settings.snapshots, instance_of(data_dir))
        stack.push_async_callback(self.snapshot_store.close)
        self.records = Records(database)
        self.journal = Journal(
            database, self.clock, max_count=settings.events.max_count, max_bytes=settings.events.max_bytes
        )
        await self.journal.start()
        stack.push_async_callback(self.journal.close)
        self.tasks = TaskGroup()
        self.isolation = await self._start_isolation()
        stack.push_async_callback(self.isolation.close)
        self.volumes = Volumes(
            data_dir / "volumes",
            kind=settings.files.volume,
            disk_bytes=settings.sandbox.disk_mib << 20,
            warm=settings.files.volume_warm,
            reserve_bytes=settings.files.host_reserve_mib << 20,
        )
        await self.volumes.start()
        stack.push_async_callback(self._close_volumes)
        self.file_events = FileEvents(data_dir / "volumes")
        await self.file_events.start()
        stack.push_async_callback(self.file_events.close)
        self._compose()
        stack.push_async_callback(self.scripts.close)
        stack.push_async_callback(self.egress.close)
        stack.push_async_callback(self.tasks.close)
        stack.push_async_callback(self.governed.close)
        stack.callback(self.files.close)
        stack.push_async_callback(self.sockets.close)
        stack.push_async_callback(self.gateway.close)
        stack.callback(self.snapshot_stores.close)
        await self.manager.adopt_all()
        await self.governed.resume(await self.governed.left_behind(self.manager.owned_ids()))
        await self.housekeeping.sweep()
        self.housekeeping.start()
        stack.push_async_callback(self.housekeeping.close)

    async def _start_isolation(self) -> Isolation:
        name = self.settings.server.container_backend
        if self._isolation_class is None:
            await gate.probe()  # better told now than with every sandbox

        def build(name: str) -> Isolation:
            return (self._isolation_class or isolation_class(name))(backend_context(self.settings, name))

        memory = self.settings.server.data_dir / "isolation"
        return await choosing.started(name, build, memory=memory, occupied=bool(await self.records.load()))

    def _compose(self) -> None:
        settings = self.settings
        stdio = StdioLimits(
            lines_per_second=settings.events.stdio_lines_per_second,
            bytes_per_second=settings.events.stdio_bytes_per_second,
        )
        self.planner = MountPlanner(settings.files.origin_roots, watchable=self._watchable)
        self.governed = GovernedMounts(
            settings.server.run_dir / instance_of(settings.server.data_dir) / "mounts",
            settings.server.data_dir / "remote",
            RemoteOptions(cache_bytes=settings.files.remote_cache_mib << 20, uploads=settings.files.remote_uploads),
            settings.files.drain_seconds,
            self.tasks,
        )
        self.mounting = Mounting(self.planner, self.governed)
        self.snapshot_stores = SnapshotStores(
            self.snapshot_store, settings.snapshots, self.planner, settings.server.data_dir / "spool"
        )
        self.snapshots = Snapshots(
            isolation=self.isolation,
            stores=self.snapshot_stores,
            settings=settings.snapshots,
            data_dir=settings.server.data_dir,
            ready=self.mounting.serve_ended,
        )
        defaults = SpecDefaults(
            image=settings.sandbox.default_image,
            cpu=settings.sandbox.cpu,
            memory_mib=settings.sandbox.memory_mib,
            pids_max=settings.sandbox.pids_max,
            gateway_url=f"http://{GATEWAY_NAME}:{settings.server.port}",
        )
        contexts = {
            protocol: client_context(settings.egress.upstream_ca_files, [protocol]) for protocol in ("http/1.1", "h2")
        }
        dialer = Dialer(own_api(settings.server.host, settings.server.port), contexts)
        self.scripts = ScriptPool()
        self.egress = EgressGates(settings.server.data_dir / "egress", dialer, self.scripts, settings.egress.default)
        self.applier = ConfigApplier(
            records=self.records,
            planner=self.planner,
            mounting=self.mounting,
            governed=self.governed,
            egress=self.egress,
            file_events=self.file_events,
            default_egress=settings.egress.default,
            defaults=defaults,
        )
        self.execs = Execs(
            self.journal, self.clock, ExecLimits(max_output_bytes=settings.exec.max_output_bytes, stdio=stdio)
        )
        entrypoints = Entrypoints(self.journal, self.clock, stdio, self.tasks)
        self.removal = Removal(
            isolation=self.isolation,
            volumes=self.volumes,
            records=self.records,
            entrypoints=entrypoints,
            egress=self.egress,
            file_events=self.file_events,
            governed=self.governed,
            snapshots=self.snapshots,
            grace_seconds=settings.sandbox.stop_grace_seconds,
        )
        self.manager = Manager(
            isolation=self.isolation,
            volumes=self.volumes,
            records=self.records,
            journal=self.journal,
            specs=SpecBuilder(
                defaults,
                self.mounting,
                settings.images,
            ),
            egress=self.egress,
            file_events=self.file_events,
            governed=self.governed,
            snapshots=self.snapshots,
            removal=self.removal,
            entrypoints=entrypoints,
            clock=self.clock,
            tasks=self.tasks,
            reconcile=self.applier.reconcile,
            revive=self.applier.revive,
            missing=self.mounting.missing,
            limits=ManagerLimits(
                max_sandboxes=settings.sandbox.max_sandboxes,
                create_timeout_seconds=settings.sandbox.create_timeout_seconds,
                default_ttl_seconds=settings.sandbox.ttl_seconds,
            ),
        )
        self.files = FileAccess()
        self.sockets = ThreadSocketFactory()
        self.gateway = Gateway(self.sockets, refused_patience_seconds=settings.proxy.dial_hold_seconds)
        self.removal.on_forget.append(self.gateway.forget)
        self.housekeeping = Housekeeping(
            manager=self.manager,
            isolation=self.isolation,
            volumes=self.volumes,
            egress=self.egress,
            governed=self.governed,
            snapshots=self.snapshots,
            records=self.records,
            clock=self.clock,
            tasks=self.tasks,
            usage_seconds=settings.events.resource_usage_seconds,
        )

    def _watchable(self) -> bool:
        return self.file_events.watching and self.volumes.separate

    async def _close_volumes(self) -> None:
        await self.volumes.close(remove_all=not self.manager.all())

    async def stop(self) -> None:
        """Leaves sandboxes running, or with `--ephemeral` removes them all first."""
        self.manager.refuse_new()
        if self.settings.server.ephemeral:
            await self.manager.shutdown_all(say)
        elif self.manager.all():
            say(f"leaving {len(self.manager.all())} sandboxes running; the next start takes them over")
        nothing_left = not self.manager.all()
        await self._stack.aclose()
        if nothing_left:
            _remove_run_folder(self.settings)


def instance_of(data_dir: Path) -> str:
    """Names everything of one server on its host. Derived from the data folder, so it never changes."""
    return hashlib.sha256(str(data_dir.resolve()).encode()).hexdigest()[:8]


def _remove_run_folder(settings: Settings) -> None:
    """Without sandboxes there is nothing that the next start would need from it."""
    shutil.rmtree(settings.server.run_dir / instance_of(settings.server.data_dir), ignore_errors=True)
    with suppress(OSError):
        settings.server.run_dir.rmdir()


def _remove_empty_run_folders(settings: Settings) -> None:
    """After a start that failed. What has something in it may be that of sandboxes which the next start takes over."""
    ours = settings.server.run_dir / instance_of(settings.server.data_dir)
    for folder in (*ours.glob("*"), ours, settings.server.run_dir):
        with suppress(OSError):
            folder.rmdir()


def backend_context(settings: Settings, name: str) -> BackendContext:
    """What an isolation plug-in gets."""
    data_dir = settings.server.data_dir
    instance = instance_of(data_dir)
    run_dir = settings.server.run_dir / instance / name
    for folder in (data_dir, data_dir / name, settings.server.run_dir, run_dir.parent, run_dir):
        _private_folder(folder)
    return BackendContext(
        instance=instance,
        data_dir=data_dir / name,
        run_dir=run_dir,
        options=settings.options_of(name),
        image_aliases=settings.image_aliases,
    )


def _private_folder(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UnavailableError(
            f"cannot use the folder {path}: {error.strerror}; choose another with --data-dir, or start as root"
        ) from error


def _take_data_dir(data_dir: Path) -> IO[str]:
    """Two servers on one data folder would fight over its sandboxes."""
    lock = (data_dir / "lock").open("a+", encoding="ascii")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip()
        lock.close()
        raise UnavailableError(
            f"another hiver server (process {owner or 'unknown'}) uses {data_dir}; stop it, or choose another"
            " --data-dir"
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def say(line: str) -> None:
    """To the operator, whatever the log is set to."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
