"""Applying a configuration to a running sandbox: synchronous, all or nothing (PROTOCOL 3.9, 0.5, 0.6)."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from hiverd.contracts.errors import ConflictError, HiverError, NotFoundError
from hiverd.contracts.isolation import Mount, WorkloadSpec
from hiverd.sandboxes.egress import EgressGates
from hiverd.sandboxes.file_events import FileEvents
from hiverd.sandboxes.governed import GovernedMounts
from hiverd.sandboxes.mounting import Mounting
from hiverd.sandboxes.mounts import MountPlanner, PlannedMount, changes_between
from hiverd.sandboxes.sandbox import Sandbox, event_filter
from hiverd.state.records import Records
from hiverd.wire.changes import BUILT_IN, Defaults
from hiverd.wire.config import SandboxConfig, config_to_wire, diff_configs, merge_immutables, redact_config
from hiverd.wire.events import ConfigApplyEvent, SystemConfigChangedEvent

Family = Literal["old", "new"]

log = logging.getLogger(__name__)

REVIVE_SECONDS: Final = 5.0


class Applied(Struct, frozen=True):
    config: SandboxConfig
    """What is in force now."""
    changes: dict[str, Any]
    error: str | None = None
    """Why nothing was changed; None when everything was."""


class ConfigApplier:
    def __init__(
        self,
        *,
        records: Records,
        planner: MountPlanner,
        mounting: Mounting,
        governed: GovernedMounts,
        egress: EgressGates,
        file_events: FileEvents,
        default_egress: Literal["allow", "deny"],
        defaults: Defaults = BUILT_IN,
    ) -> None:
        self._records = records
        self._planner = planner
        self._mounting = mounting
        self._governed = governed
        self._egress = egress
        self._file_events = file_events
        self._default_egress = default_egress
        self._defaults = defaults

    async def apply(self, sandbox: Sandbox, desired: SandboxConfig, family: Family) -> Applied:
        """`desired` is valid already. `ConflictError` while another apply of this sandbox is under way.

        Goes on when the caller leaves: a half-made change is never left standing.
        """
        if sandbox.changing.locked():
            raise ConflictError(f'a previous apply to sandbox "{sandbox.key}" is still in progress')
        if sandbox.status != "running" or sandbox.spec is None:
            raise NotFoundError(f'sandbox "{sandbox.key}" is {sandbox.status}')
        await sandbox.changing.acquire()
        task = asyncio.create_task(self._apply(sandbox, sandbox.spec, desired, family), name=f"apply-{sandbox.key}")
        return await asyncio.shield(task)

    async def _apply(self, sandbox: Sandbox, spec: WorkloadSpec, desired: SandboxConfig, family: Family) -> Applied:
        try:
            current = sandbox.config
            effective, warnings = merge_immutables(current, desired, family=family, defaults=self._defaults)
            changes = diff_configs(current, effective, default_egress=self._default_egress)
            if warnings:
                changes["warnings"] = warnings
            planned = await self._planner.judge(effective)
            try:
                await self._switch(sandbox, spec, effective, planned)
            except Exception as error:
                log.exception("apply to %s failed and was rolled back", sandbox.key)
                message = error.message if isinstance(error, HiverError) else "the change could not be made"
                sandbox.events.emit(ConfigApplyEvent(success=False, changes=_shown(changes), errorMessage=message))
                return Applied(current, changes, message)
            sandbox.events.set_filter(event_filter(effective))
            await self._follow_files(sandbox)
            await self._governed.set_recording(sandbox)
            sandbox.events.emit(ConfigApplyEvent(success=True, changes=_shown(changes)))
            shown = redact_config(config_to_wire(effective, family="new"))
            sandbox.events.emit(SystemConfigChangedEvent(config=shown))
            return Applied(effective, changes)
        finally:
            sandbox.changing.release()

    async def _follow_files(self, sandbox: Sandbox) -> None:
        """The change is in force by now, whatever becomes of its events."""
        try:
            await self._file_events.follow(sandbox)
        except HiverError as error:
            log.error("sandbox %s: accesses of its native mounts are not on record: %s", sandbox.key, error.message)

    async def _switch(
        self, sandbox: Sandbox, spec: WorkloadSpec, effective: SandboxConfig, planned: list[PlannedMount]
    ) -> None:
        """Mounts first, then the record; each step undone if a later one fails."""

        async def record(touched: tuple[Mount, ...]) -> None:
            await self._records.set_spec(sandbox.id, msgspec.structs.replace(spec, mounts=touched))

        changes = changes_between(self._planner.plan(sandbox.config), planned)
        try:
            async with self._mounting.switched(sandbox, spec, changes, record) as mounts:
                new_spec = msgspec.structs.replace(spec, mounts=mounts)
                await self._records.set_config(sandbox.id, msgspec.json.encode(effective), new_spec)
                sandbox.config = effective
                sandbox.spec = new_spec
        except BaseException:
            if sandbox.spec is spec:
                await self._records.set_spec(sandbox.id, spec)
            raise
        self._egress.change(sandbox)

    async def reconcile(self, sandbox: Sandbox) -> None:
        """After a restart of the server: mounts as the stored configuration wants them."""
        spec = sandbox.spec
        if spec is not None:
            mounts = await self._mounting.restored(sandbox, spec)
            sandbox.spec = msgspec.structs.replace(spec, mounts=mounts)
            await self._records.set_spec(sandbox.id, sandbox.spec)

    async def revive(self, sandbox: Sandbox, target: str) -> None:
        """The process behind a governed mount has died. Waits for an apply that is under way, and stands for one."""
        while sandbox.status == "running":
            async with sandbox.changing:
                if await self._revived(sandbox, target):
                    return
            await asyncio.sleep(REVIVE_SECONDS)

    async def _revived(self, sandbox: Sandbox, target: str) -> bool:
        """True if there is nothing more to do."""
        if sandbox.status != "running" or sandbox.spec is None:
            return True
        log.warning("sandbox %s: the process of mount %s has died; starting another", sandbox.key, target)
        try:
            await self._mounting.revive(sandbox, sandbox.spec, target)
        except Exception:
            log.exception("sandbox %s: mount %s is not back yet", sandbox.key, target)
            return False
        return True


def _shown(changes: dict[str, Any]) -> dict[str, Any]:
    """Changes as events carry them: without the secrets of mounts and overrides (PROTOCOL 0.9)."""
    shown: dict[str, Any] = {}
    for part, change in changes.items():
        if part not in {"fs", "egress"}:
            shown[part] = change
            continue
        shown[part] = {side: redact_config({part: entries})[part] for side, entries in change.items()}
    return shown
