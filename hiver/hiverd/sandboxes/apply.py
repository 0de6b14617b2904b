"""Applying a configuration to a running sandbox: synchronous, all or nothing (PROTOCOL 3.9, 0.5, 0.6)."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Literal

import msgspec
from msgspec import Struct

from hiverd.contracts.errors import ConflictError, HiverError, NotFoundError
from hiverd.contracts.isolation import Mount, WorkloadSpec
from hiverd.sandboxes.egress import EgressGates
from hiverd.sandboxes.file_events import FileEvents
from hiverd.sandboxes.mounts import MountPlanner, PlannedMount, changed_mounts
from hiverd.sandboxes.sandbox import Sandbox, event_filter
from hiverd.state.records import Records
from hiverd.wire.changes import BUILT_IN, Defaults
from hiverd.wire.config import SandboxConfig, config_to_wire, diff_configs, merge_immutables, redact_config
from hiverd.wire.events import ConfigApplyEvent, SystemConfigChangedEvent

Family = Literal["old", "new"]

log = logging.getLogger(__name__)


class Applied(Struct, frozen=True):
    config: SandboxConfig
    """What is in force now."""
    changes: dict[str, Any]
    error: str | None = None
    """Why nothing was changed; None when everything was."""


class ConfigApplier:
    def __init__(
        self,
        records: Records,
        mounts: MountPlanner,
        egress: EgressGates,
        file_events: FileEvents,
        default_egress: Literal["allow", "deny"],
        defaults: Defaults = BUILT_IN,
    ) -> None:
        self._records = records
        self._mounts = mounts
        self._egress = egress
        self._file_events = file_events
        self._default_egress = default_egress
        self._defaults = defaults

    async def apply(self, sandbox: Sandbox, desired: SandboxConfig, family: Family) -> Applied:
        """`desired` is valid already. `ConflictError` while another apply of this sandbox is under way.

        Goes on when the caller leaves: a half-made change is never left standing.
        """
        if sandbox.applying:
            raise ConflictError(f'a previous apply to sandbox "{sandbox.key}" is still in progress')
        if sandbox.status != "running" or sandbox.spec is None:
            raise NotFoundError(f'sandbox "{sandbox.key}" is {sandbox.status}')
        sandbox.applying = True
        task = asyncio.create_task(self._apply(sandbox, sandbox.spec, desired, family), name=f"apply-{sandbox.key}")
        return await asyncio.shield(task)

    async def _apply(self, sandbox: Sandbox, spec: WorkloadSpec, desired: SandboxConfig, family: Family) -> Applied:
        try:
            current = sandbox.config
            effective, warnings = merge_immutables(current, desired, family=family, defaults=self._defaults)
            changes = diff_configs(current, effective, default_egress=self._default_egress)
            if warnings:
                changes["warnings"] = warnings
            planned = self._mounts.plan(effective)
            try:
                await self._switch(sandbox, spec, effective, planned)
            except Exception as error:
                log.exception("apply to %s failed and was rolled back", sandbox.key)
                message = error.message if isinstance(error, HiverError) else "the change could not be made"
                sandbox.events.emit(ConfigApplyEvent(success=False, changes=_shown(changes), errorMessage=message))
                return Applied(current, changes, message)
            sandbox.events.set_filter(event_filter(effective))
            await self._file_events.follow(sandbox)
            sandbox.events.emit(ConfigApplyEvent(success=True, changes=_shown(changes)))
            shown = redact_config(config_to_wire(effective, family="new"))
            sandbox.events.emit(SystemConfigChangedEvent(config=shown))
            return Applied(effective, changes)
        finally:
            sandbox.applying = False

    async def _switch(
        self, sandbox: Sandbox, spec: WorkloadSpec, effective: SandboxConfig, planned: list[PlannedMount]
    ) -> None:
        """Mounts first, then the record; each step undone if a later one fails."""
        added, removed = changed_mounts(self._mounts.plan(sandbox.config), planned)
        new_mounts = [await asyncio.to_thread(self._mounts.prepare, plan, spec.volume) for plan in added]
        mounts = {mount.target: mount for mount in spec.mounts}
        undo: list[tuple[str, Mount]] = []
        if new_mounts:
            # A server that dies from here on leaves mounts that the next one must know of to take them away.
            touched = (*spec.mounts, *new_mounts)
            await self._records.set_spec(sandbox.id, msgspec.structs.replace(spec, mounts=touched))
        try:
            for plan in removed:
                await sandbox.workload.remove_mount(plan.target)
                undo.append(("add", mounts.pop(plan.target)))
            for mount in new_mounts:
                await sandbox.workload.add_mount(mount)
                undo.append(("remove", mount))
                mounts[mount.target] = mount
            new_spec = msgspec.structs.replace(spec, mounts=tuple(mounts.values()))
            await self._records.set_config(sandbox.id, msgspec.json.encode(effective), new_spec)
        except BaseException:
            await self._undo(sandbox, undo)
            await self._records.set_spec(sandbox.id, spec)
            raise
        sandbox.config = effective
        sandbox.spec = new_spec
        self._egress.change(sandbox)

    async def _undo(self, sandbox: Sandbox, steps: list[tuple[str, Mount]]) -> None:
        for step, mount in reversed(steps):
            try:
                if step == "add":
                    await sandbox.workload.add_mount(mount)
                else:
                    await sandbox.workload.remove_mount(mount.target)
            except Exception:
                log.exception("apply to %s: could not %s mount %s again", sandbox.key, step, mount.target)

    async def reconcile(self, sandbox: Sandbox) -> None:
        """After a restart: a server that died in mid-apply may have left mounts that the stored configuration lacks."""
        spec = sandbox.spec
        if spec is None:
            return
        wanted = [
            await asyncio.to_thread(self._mounts.prepare, plan, spec.volume)
            for plan in self._mounts.plan(sandbox.config)
        ]
        if tuple(wanted) != spec.mounts:
            for target in {mount.target for mount in spec.mounts if mount not in wanted}:
                await sandbox.workload.remove_mount(target)
        present = await sandbox.workload.mounted_targets()
        for mount in wanted:
            if mount.target not in present:
                await sandbox.workload.add_mount(mount)
        sandbox.spec = msgspec.structs.replace(spec, mounts=tuple(wanted))
        await self._records.set_spec(sandbox.id, sandbox.spec)


def _shown(changes: dict[str, Any]) -> dict[str, Any]:
    """Changes as events carry them: without the secrets of mounts and overrides (PROTOCOL 0.9)."""
    shown: dict[str, Any] = {}
    for part, change in changes.items():
        if part not in {"fs", "egress"}:
            shown[part] = change
            continue
        shown[part] = {side: redact_config({part: entries})[part] for side, entries in change.items()}
    return shown
