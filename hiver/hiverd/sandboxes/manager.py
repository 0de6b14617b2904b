"""The sandboxes of this server: get-or-create, adopt, shut down. The only place that changes a sandbox's status.

Crash safety rests on one order: the record is written before the first side effect and deleted after the last one.
Whatever happens in between, a restart finds the record and either adopts what runs or removes what is half made.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, Final

import msgspec
from msgspec import Struct

from hiverd.clock import Clock
from hiverd.contracts.errors import (
    BackendError,
    ConflictError,
    HiverError,
    NotFoundError,
    SandboxGoneError,
    UnavailableError,
)
from hiverd.contracts.isolation import Isolation, Workload, WorkloadSpec
from hiverd.files.volumes import Volumes
from hiverd.sandboxes.egress import EgressGates
from hiverd.sandboxes.entrypoints import Entrypoints
from hiverd.sandboxes.file_events import FileEvents
from hiverd.sandboxes.governed import GovernedMounts
from hiverd.sandboxes.lifecycle import LifecycleStream
from hiverd.sandboxes.removal import Removal
from hiverd.sandboxes.sandbox import Sandbox, event_filter
from hiverd.sandboxes.snapshotting import HalfRestoredError, Snapshots
from hiverd.sandboxes.specs import SpecBuilder
from hiverd.sandboxes.tasks import TaskGroup
from hiverd.state.journal import Journal
from hiverd.state.records import Records, SandboxRecord
from hiverd.wire.answers import LifecycleEvent, LifecycleStatus
from hiverd.wire.config import SandboxConfig, config_of_document
from hiverd.wire.events import SystemShutdownEvent, SystemStartEvent

log = logging.getLogger(__name__)

ADOPT_RETRY_SECONDS: Final = 5.0


class ManagerLimits(Struct, frozen=True):
    max_sandboxes: int
    create_timeout_seconds: float
    default_ttl_seconds: int


class Manager:
    def __init__(
        self,
        *,
        isolation: Isolation,
        volumes: Volumes,
        records: Records,
        journal: Journal,
        specs: SpecBuilder,
        entrypoints: Entrypoints,
        egress: EgressGates,
        file_events: FileEvents,
        governed: GovernedMounts,
        snapshots: Snapshots,
        removal: Removal,
        clock: Clock,
        tasks: TaskGroup,
        reconcile: Callable[[Sandbox], Awaitable[None]],
        revive: Callable[[Sandbox, str], Coroutine[Any, Any, None]],
        missing: Callable[[Sandbox], list[str]],
        limits: ManagerLimits,
    ) -> None:
        self._isolation = isolation
        self._volumes = volumes
        self._records = records
        self._journal = journal
        self._specs = specs
        self._entrypoints = entrypoints
        self._egress = egress
        self._file_events = file_events
        self._clock = clock
        self._tasks = tasks
        self._reconcile = reconcile
        self._revive = revive
        self._missing = missing
        self._snapshots = snapshots
        governed.on_lost = self._mount_lost
        self._removal = removal
        self._limits = limits
        self._by_key: dict[str, Sandbox] = {}
        self._by_id: dict[str, Sandbox] = {}
        self._slots: set[int] = set()
        self._closing = False
        self.lifecycle = LifecycleStream()

    # -- finding ----------------------------------------------------------------------------------------------------

    def by_id(self, sandbox_id: str) -> Sandbox | None:
        return self._by_id.get(sandbox_id)

    def by_key(self, key: str) -> Sandbox | None:
        return self._by_key.get(key)

    def all(self) -> list[Sandbox]:
        return list(self._by_id.values())

    def running_now(self) -> list[LifecycleEvent]:
        return [LifecycleEvent(s.id, s.key, "start") for s in self.all() if s.status == "running"]

    # -- creating ---------------------------------------------------------------------------------------------------

    async def get_or_create(
        self, key: str, read_config: Callable[[], Awaitable[SandboxConfig]]
    ) -> tuple[Sandbox, bool]:
        """The running sandbox of that key, and whether this call created it (PROTOCOL 3.1).

        `read_config` is called only when a sandbox must be created, so a wrong configuration for an existing key is
        ignored. Racing callers get one sandbox. A caller that leaves does not stop the creation.
        """
        config: SandboxConfig | None = None
        while True:
            existing = self._by_key.get(key)
            if existing is None and config is None:
                config = await read_config()  # which may take time, so look again
                continue
            if existing is None:
                assert config is not None  # noqa: S101 -- read above
                sandbox = self._begin_create(key, config)
                await asyncio.shield(sandbox.created)
                return sandbox, True
            if existing.status == "stopping":
                await existing.until_destroyed()
                continue
            await asyncio.shield(existing.created)
            if existing.status == "running":
                existing.touch()
                return existing, False

    def _begin_create(self, key: str, config: SandboxConfig) -> Sandbox:
        if self._closing:
            raise UnavailableError("the server is shutting down")
        if len(self._by_id) >= self._limits.max_sandboxes:
            raise ConflictError(
                f"this server runs its maximum of {self._limits.max_sandboxes} sandboxes; shut one down, or raise"
                " sandbox.max_sandboxes"
            )
        sandbox_id = str(uuid.uuid4())
        events = self._journal.open(sandbox_id, last_id=0, types=event_filter(config))
        sandbox = Sandbox(
            sandbox_id=sandbox_id,
            key=key,
            slot=self._take_slot(),
            config=config,
            events=events,
            clock=self._clock,
            default_ttl_seconds=self._limits.default_ttl_seconds,
        )
        self._by_id[sandbox.id] = self._by_key[key] = sandbox
        self._tasks.start(self._create(sandbox), name=f"create-{key}")
        return sandbox

    def _take_slot(self) -> int:
        slot = 0
        while slot in self._slots:
            slot += 1
        self._slots.add(slot)
        return slot

    async def _create(self, sandbox: Sandbox) -> None:
        try:
            async with asyncio.timeout(self._limits.create_timeout_seconds):
                workload = await self._build(sandbox)
        except Exception as error:
            log.warning("create %s: failed: %s", sandbox.key, error, exc_info=not isinstance(error, HiverError))
            # Told only when the key is free again, so that a caller who tries once more meets no remains; but an engine
            # that is away keeps nobody waiting.
            self._tasks.start(self._tear_down(sandbox, announce_stop=False), name=f"remove-{sandbox.key}")
            with contextlib.suppress(UnavailableError):
                await sandbox.until_destroyed()
            sandbox.created.set_exception(_as_create_error(error))
            return
        if sandbox.status == "stopping":
            # Shut down while it was being created: the shutdown waits for this very future.
            sandbox.created.set_exception(ConflictError(f'sandbox "{sandbox.key}" was shut down while it started'))
            return
        sandbox.status = "running"
        sandbox.has_lived = True
        sandbox.touch()
        self._publish(sandbox, "start")
        self._watch(sandbox, workload)
        sandbox.created.set_result(None)

    async def _build(self, sandbox: Sandbox) -> Workload:
        await self._records.insert(self._record_of(sandbox))
        sandbox.events.emit(SystemStartEvent())
        workload, spec = await self._make(sandbox)
        try:
            await self._snapshots.restore(sandbox)
        except HalfRestoredError as error:
            log.warning("create %s: made anew, as its snapshot was restored in part only: %s", sandbox.key, error)
            await self._removal.take_apart(sandbox)
            await self._volumes.release(sandbox.id)
            workload, spec = await self._make(sandbox)
        # Only now: the sandbox trusts its own authority, and nothing of this is recorded as what the agent does.
        await self._egress.open(sandbox, fresh=True)
        await self._file_events.follow(sandbox)
        await workload.begin()
        await self._records.set_running(sandbox.id, spec, workload.state)
        await self._entrypoints.settle(sandbox)
        return workload

    async def _make(self, sandbox: Sandbox) -> tuple[Workload, WorkloadSpec]:
        """Everything up to the first instruction."""
        image = await self._isolation.resolve_image(
            self._specs.image_name(sandbox.config), lambda line: log.info("create %s: %s", sandbox.key, line)
        )
        volume = await self._volumes.allocate(sandbox.id, sandbox.slot)
        sandbox.spec = await self._specs.build(sandbox, image, volume)
        workload = await self._isolation.create(sandbox.spec)
        sandbox.set_workload(workload)
        return workload, sandbox.spec

    def _record_of(self, sandbox: Sandbox) -> SandboxRecord:
        return SandboxRecord(
            id=sandbox.id,
            key=sandbox.key,
            slot=sandbox.slot,
            status="starting",
            backend=self._isolation.name,
            config=msgspec.json.encode(sandbox.config),
            created_at=self._clock.wall(),
            last_activity_at=sandbox.last_activity_at,
        )

    def _watch(self, sandbox: Sandbox, workload: Workload) -> None:
        self._entrypoints.follow(sandbox, workload)
        self._tasks.start(self._await_exit(sandbox, workload), name=f"exit-{sandbox.key}")

    async def _await_exit(self, sandbox: Sandbox, workload: Workload) -> None:
        outcome = await workload.wait()
        if sandbox.status == "running":
            log.info("sandbox %s ended by itself, exit code %d", sandbox.key, outcome.exit_code)
            self._publish(sandbox, "die")
            await self.shutdown(sandbox)

    def _mount_lost(self, sandbox_id: str, target: str) -> None:
        sandbox = self._by_id.get(sandbox_id)
        if sandbox is not None and sandbox.status == "running" and not self._closing:
            self._tasks.start(self._revive(sandbox, target), name=f"revive-{sandbox.key}")

    # -- shutting down ----------------------------------------------------------------------------------------------

    async def shutdown(self, sandbox: Sandbox, *, expired: bool = False, tell: bool = False) -> None:
        """Stops and removes a sandbox; returns when its key is free. Any number of callers, one teardown.

        It goes on when the caller leaves, and after an `UnavailableError`, raised while an engine is away. `tell`:
        raises `BackendError` afterwards if its last snapshot is not where it should be.
        """
        if sandbox.status != "stopping":
            starting = sandbox.status == "starting"
            sandbox.status = "stopping"
            if expired:
                sandbox.events.emit(SystemShutdownEvent())
            self._tasks.start(self._shut_down(sandbox, starting=starting), name=f"shutdown-{sandbox.key}")
        await sandbox.until_destroyed()
        if tell and sandbox.end_error is not None:
            raise BackendError(sandbox.end_error)

    async def _shut_down(self, sandbox: Sandbox, *, starting: bool) -> None:
        if starting:
            # Nothing is interrupted half way: the creation ends first, well or badly, then everything goes.
            await asyncio.wait({sandbox.created})
            if sandbox.being_removed:
                return
        await self._tear_down(sandbox, announce_stop=True)

    async def _tear_down(self, sandbox: Sandbox, *, announce_stop: bool) -> None:
        sandbox.being_removed = True
        sandbox.status = "stopping"
        if announce_stop:
            self._publish(sandbox, "stop")
        await self._removal.remove(sandbox)
        self._by_id.pop(sandbox.id, None)
        self._by_key.pop(sandbox.key, None)
        self._slots.discard(sandbox.slot)
        self._publish(sandbox, "destroy")
        sandbox.destroyed.set()

    def _publish(self, sandbox: Sandbox, change: LifecycleStatus) -> None:
        self.lifecycle.publish(LifecycleEvent(sandbox.id, sandbox.key, change))

    # -- starting and stopping the server ---------------------------------------------------------------------------

    async def adopt_all(self) -> None:
        """Takes over what an earlier server left: running sandboxes go on, half-made and half-removed ones go."""
        await asyncio.gather(*(self._adopt(record) for record in await self._records.load()))

    async def _adopt(self, record: SandboxRecord) -> None:
        config = config_of_document(msgspec.json.decode(record.config))
        events = self._journal.open(record.id, last_id=record.last_event_id, types=event_filter(config))
        sandbox = Sandbox(
            sandbox_id=record.id,
            key=record.key,
            slot=record.slot,
            config=config,
            events=events,
            clock=self._clock,
            default_ttl_seconds=self._limits.default_ttl_seconds,
        )
        sandbox.restore_activity(record.last_activity_at)
        sandbox.spec = record.spec
        self._by_id[sandbox.id] = self._by_key[sandbox.key] = sandbox
        self._slots.add(sandbox.slot)
        sandbox.isolation_state = record.state or {}
        sandbox.has_lived = record.status != "starting" and record.spec is not None
        await self._volumes.adopt(record.id)
        if record.status != "running" or record.spec is None:
            sandbox.created.set_exception(NotFoundError(f'sandbox "{record.key}" was being removed'))
            sandbox.status = "stopping"
            self._tasks.start(self._go_on_removing(sandbox), name=f"remove-{sandbox.key}")
            return
        if not await self._try_adopt(sandbox, record):
            self._tasks.start(self._keep_adopting(sandbox, record), name=f"adopt-{sandbox.key}")

    async def _go_on_removing(self, sandbox: Sandbox) -> None:
        if sandbox.has_lived and sandbox.spec is not None:
            try:  # it may not have been stopped yet
                sandbox.set_workload(await self._isolation.adopt(sandbox.spec, sandbox.isolation_state))
            except HiverError as error:
                log.info("sandbox %s: %s", sandbox.key, error.message)
        await self._tear_down(sandbox, announce_stop=False)

    async def _try_adopt(self, sandbox: Sandbox, record: SandboxRecord) -> bool:
        """False when it could not be found out: unknown is not dead."""
        assert record.spec is not None  # noqa: S101 -- checked by the caller
        try:
            workload = await self._isolation.adopt(record.spec, record.state or {})
        except SandboxGoneError:
            log.info("sandbox %s ended while no server was running", sandbox.key)
            self._publish(sandbox, "die")
            sandbox.created.set_exception(NotFoundError(f'sandbox "{sandbox.key}" has ended'))
            sandbox.status = "stopping"
            self._tasks.start(self._tear_down(sandbox, announce_stop=True), name=f"remove-{sandbox.key}")
            return True
        except Exception:
            log.exception("sandbox %s: cannot be adopted yet", sandbox.key)
            return False
        sandbox.set_workload(workload)
        try:
            await self._reconcile(sandbox)
        except Exception:
            log.exception("sandbox %s: its mounts differ from its configuration", sandbox.key)
        await self._follow_files(sandbox)
        await self._open_gate(sandbox)
        sandbox.status = "running"
        self._entrypoints.resume(sandbox, record.log_position)
        self._watch(sandbox, workload)
        sandbox.created.set_result(None)
        return True

    async def _follow_files(self, sandbox: Sandbox) -> None:
        try:
            await self._file_events.follow(sandbox)
        except Exception:
            log.exception("sandbox %s: accesses of its native mounts are not on record", sandbox.key)

    async def _open_gate(self, sandbox: Sandbox) -> None:
        """For a sandbox that runs already: until it is open, nothing leaves."""
        try:
            await self._egress.open(sandbox, fresh=False)
        except Exception:
            log.exception("sandbox %s: nothing leaves it, since its gate cannot be set up", sandbox.key)
        if sandbox.status == "stopping":  # meanwhile
            await self._egress.release(sandbox.id)

    async def open_gates(self) -> None:
        """Tries again where a gate could not be set up."""
        for sandbox in self.all():
            if sandbox.status == "running" and not self._egress.is_open(sandbox.id):
                await self._open_gate(sandbox)

    async def revive_mounts(self) -> None:
        """Tries again where a governed mount has nothing behind it."""
        for sandbox in self.all():
            if sandbox.status == "running" and not sandbox.changing.locked():
                for target in self._missing(sandbox):
                    self._mount_lost(sandbox.id, target)

    async def _keep_adopting(self, sandbox: Sandbox, record: SandboxRecord) -> None:
        while sandbox.status == "starting":
            await asyncio.sleep(ADOPT_RETRY_SECONDS)
            if await self._try_adopt(sandbox, record):
                return

    def owned_ids(self) -> frozenset[str]:
        return frozenset(self._by_id)

    def refuse_new(self) -> None:
        """The server stops: creations from now on are refused."""
        self._closing = True

    async def shutdown_all(self, report: Callable[[str], None]) -> None:
        """`--ephemeral`: tears every sandbox down, side by side, telling about progress."""
        sandboxes: Iterable[Sandbox] = self.all()
        pending = {asyncio.ensure_future(self.shutdown(sandbox)) for sandbox in sandboxes}
        while pending:
            report(f"shutting down: {len(pending)} sandboxes left")
            done, pending = await asyncio.wait(pending, timeout=2.0, return_when=asyncio.ALL_COMPLETED)
            for failed in done:
                if (error := failed.exception()) is not None:
                    report(f"left for the next start: {error}")


def _as_create_error(error: Exception) -> HiverError:
    if isinstance(error, HiverError):
        return error
    if isinstance(error, TimeoutError):
        return BackendError("the sandbox did not start in time; see sandbox.create_timeout_seconds")
    return BackendError("the sandbox could not be started; the server's log says why")
