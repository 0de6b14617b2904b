"""A sandbox's mounts, made for its start, changed while it runs, restored after a crash. All or nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from hiverd.contracts.errors import BackendError, HiverError
from hiverd.contracts.isolation import Mount, WorkloadSpec
from hiverd.files.sever import sever
from hiverd.sandboxes.governed import GovernedMounts
from hiverd.sandboxes.mount_server import MountServer
from hiverd.sandboxes.mounts import MountChanges, MountPlanner, PlannedMount
from hiverd.sandboxes.sandbox import Sandbox

log = logging.getLogger(__name__)

Undo = Callable[[], Awaitable[None]]
Record = Callable[[tuple[Mount, ...]], Awaitable[None]]


class Mounting:
    def __init__(self, planner: MountPlanner, governed: GovernedMounts) -> None:
        self.planner = planner
        self.governed = governed

    async def make(self, sandbox: Sandbox, volume: Path) -> tuple[Mount, ...]:
        """For a sandbox that is about to be created. On an error the caller releases the sandbox's governed mounts."""
        plans = [plan for plan in self.planner.plan(sandbox.config) if plan.kind != "internal"]
        made = await asyncio.gather(*(self._make_one(sandbox, plan, volume) for plan in plans), return_exceptions=True)
        mounts = [mount for mount in made if isinstance(mount, Mount)]
        for failure in made:
            if isinstance(failure, BaseException):
                raise failure
        return tuple(mounts)

    async def _make_one(self, sandbox: Sandbox, plan: PlannedMount, volume: Path) -> Mount:
        local = await self.local(plan, volume)
        if plan.kind == "native":
            assert local is not None  # noqa: S101 -- native mounts are local
            return local
        server, mount = await self.governed.start(sandbox, plan, Path(local.source) if local else volume)
        self.governed.use(sandbox.id, plan.target, server)
        return mount

    async def local(self, plan: PlannedMount, volume: Path) -> Mount | None:
        """The folder behind a local mount; None for remote ones."""
        return None if plan.remote else await asyncio.to_thread(self.planner.prepare, plan, volume)

    # -- changing ---------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def switched(
        self, sandbox: Sandbox, spec: WorkloadSpec, changes: MountChanges, record: Record
    ) -> AsyncIterator[tuple[Mount, ...]]:
        """The mounts as they are afterwards. What the body of the `async with` raises undoes everything.

        `record` is told of mounts before they are attached, so that a server that dies in the middle leaves no mount
        that the next one does not know of.
        """
        switch = _Switch(self, sandbox, spec, record)
        try:
            await switch.perform(changes)
            yield tuple(switch.mounts.values())
        except BaseException:
            await switch.roll_back()
            raise
        await switch.settle(changes)

    # -- after a crash ----------------------------------------------------------------------------------------------

    async def restored(self, sandbox: Sandbox, spec: WorkloadSpec) -> tuple[Mount, ...]:
        """After a restart of the server: what the configuration wants is mounted, and nothing else.

        A server that died in mid-apply may have left mounts that the stored configuration lacks; mount servers may have
        died too.
        """
        workload = sandbox.workload
        known = {mount.target: mount for mount in spec.mounts}
        wanted: dict[str, Mount] = {}
        failed: dict[str, Mount] = {}
        for plan in self.planner.plan(sandbox.config):
            before = known.get(plan.target)
            if plan.kind == "internal":
                continue
            try:
                wanted[plan.target] = await self._restored_one(sandbox, plan, spec.volume, known)
            except (HiverError, OSError):
                log.exception("sandbox %s: mount %s is not back yet", sandbox.key, plan.target)
                if before is not None:
                    failed[plan.target] = before
        for target, mount in known.items():
            if target not in failed and wanted.get(target) != mount:
                await workload.remove_mount(target)
        present = await workload.mounted_targets()
        for target, mount in wanted.items():
            if target not in present or known.get(target) != mount:
                await workload.add_mount(mount)
        return (*wanted.values(), *failed.values())

    async def serve_ended(self, sandbox: Sandbox) -> None:
        """What is mounted in a sandbox can be read from here, also when its workload has ended and the server was
        started anew since. Raises `HiverError` if a mount has nothing behind it."""
        spec = sandbox.spec
        if spec is None:
            return
        mounts = {mount.target: mount for mount in spec.mounts}
        for plan in self.planner.plan(sandbox.config):
            mount = mounts.get(plan.target)
            if plan.kind != "governed" or mount is None or self.governed.is_served(sandbox.id, plan.target):
                continue
            if sandbox.status == "running":
                raise BackendError(f"mount {plan.target} is not served at the moment")
            if not await self.governed.adopt(sandbox, plan, mount):
                await self.governed.discard(sandbox, mount)
                local = await self.local(plan, spec.volume)
                folder = Path(local.source) if local else spec.volume
                server, _ = await self.governed.start(sandbox, plan, folder, mount)
                self.governed.use(sandbox.id, plan.target, server)

    def missing(self, sandbox: Sandbox) -> list[str]:
        """Governed mounts with nothing behind them, which `revive` may bring back."""
        plans = self.planner.plan(sandbox.config)
        governed = [plan.target for plan in plans if plan.kind == "governed"]
        return [target for target in governed if not self.governed.is_served(sandbox.id, target)]

    async def _restored_one(self, sandbox: Sandbox, plan: PlannedMount, volume: Path, known: dict[str, Mount]) -> Mount:
        mount = known.get(plan.target)
        if plan.kind == "governed" and mount is not None:
            if await self.governed.adopt(sandbox, plan, mount):
                return mount
            log.warning("sandbox %s: the process of mount %s has died; starting another", sandbox.key, plan.target)
            return await self._start_again(sandbox, plan, volume, known.pop(plan.target))
        return await self._make_one(sandbox, plan, volume)

    async def _start_again(self, sandbox: Sandbox, plan: PlannedMount, volume: Path, mount: Mount) -> Mount:
        # First out of the sandbox: as long as nothing answers at the source, it is known by its place.
        await sandbox.workload.remove_mount(plan.target)
        await self.governed.discard(sandbox, mount)
        local = await self.local(plan, volume)
        server, renewed = await self.governed.start(sandbox, plan, Path(local.source) if local else volume, mount)
        self.governed.use(sandbox.id, plan.target, server)
        return renewed

    async def revive(self, sandbox: Sandbox, spec: WorkloadSpec, target: str) -> None:
        """The process behind a mount has died: another one on the same data takes its place. May be tried again."""
        plan = next((plan for plan in self.planner.plan(sandbox.config) if plan.target == target), None)
        mount = next((mount for mount in spec.mounts if mount.target == target), None)
        if self.governed.is_served(sandbox.id, target):
            return  # somebody was faster
        if plan is not None and plan.kind == "governed" and mount is not None:
            await sandbox.workload.add_mount(await self._start_again(sandbox, plan, spec.volume, mount))


def _sever(folder: Path) -> None:
    """Copies every file: one that is open to all now may be restricted by a later change, and whoever holds it open
    would go on. If that fails, for want of space say, the folder is whole again, and as before."""
    try:
        sever(folder, lambda _: True)
    except OSError:
        sever(folder, lambda _: False)
        raise


class _Switch:
    """One change under way: what was done, and how to undo it."""

    def __init__(self, mounting: Mounting, sandbox: Sandbox, spec: WorkloadSpec, record: Record) -> None:
        self.mounts = {mount.target: mount for mount in spec.mounts}
        self._mounting = mounting
        self._governed = mounting.governed
        self._sandbox = sandbox
        self._spec = spec
        self._record = record
        self._undo: list[tuple[str, Undo]] = []
        self._started: dict[str, MountServer] = {}

    async def perform(self, changes: MountChanges) -> None:
        """What may fail for reasons outside comes first, what disturbs the workload last."""
        remote = [plan for plan in changes.added if plan.kind == "governed" and plan.remote]
        local = [plan for plan in changes.added if plan.kind != "internal" and not plan.remote]
        new = [await self._start(plan, self._spec.volume) for plan in remote]
        for before, after in changes.governed_anew:
            await self._change(before, after)
        for plan in changes.removed:
            if plan.target in self.mounts:
                await self._detach(plan.target)
        was_governed = {plan.target for plan in changes.removed if plan.kind == "governed"}
        new += [await self._local(plan, sever_first=plan.target not in was_governed) for plan in local]
        if new:
            await self._record((*self._spec.mounts, *new))
        for mount in new:
            await self._attach(mount)

    async def _start(self, plan: PlannedMount, folder: Path) -> Mount:
        server, mount = await self._governed.start(self._sandbox, plan, folder)
        self._undo.append((f"end the mount server of {plan.target}", lambda: self._governed.end(server, plan)))
        self._started[plan.target] = server
        return mount

    async def _change(self, before: PlannedMount, after: PlannedMount) -> None:
        undo = (f"restore the rules of {after.target}", lambda: self._governed.change(self._sandbox, after, before))
        self._undo.append(undo)
        await self._governed.change(self._sandbox, before, after)

    async def _local(self, plan: PlannedMount, *, sever_first: bool) -> Mount:
        mount = await self._mounting.local(plan, self._spec.volume)
        assert mount is not None  # noqa: S101 -- it is local
        if plan.kind == "native":
            return mount
        if sever_first and plan.origin is None:
            await asyncio.to_thread(_sever, Path(mount.source))
        return await self._start(plan, Path(mount.source))

    async def _detach(self, target: str) -> None:
        mount = self.mounts[target]
        await self._sandbox.workload.remove_mount(target)
        self._undo.append((f"mount {target} again", lambda: self._sandbox.workload.add_mount(mount)))
        del self.mounts[target]

    async def _attach(self, mount: Mount) -> None:
        await self._sandbox.workload.add_mount(mount)
        self._undo.append((f"unmount {mount.target}", lambda: self._sandbox.workload.remove_mount(mount.target)))
        self.mounts[mount.target] = mount

    async def roll_back(self) -> None:
        """Goes on when a step fails: as much as possible is as it was."""
        for what, undo in reversed(self._undo):
            try:
                await undo()
            except Exception:
                log.exception("apply to %s: could not %s", self._sandbox.key, what)

    async def settle(self, changes: MountChanges) -> None:
        """The change stands: servers of what was removed end. Whatever that meets, it stands."""
        gone = [(plan, self._governed.take(self._sandbox.id, plan.target)) for plan in changes.removed]
        for target, server in self._started.items():
            self._governed.use(self._sandbox.id, target, server)
        for plan, before in gone:
            if before is not None:
                try:
                    await self._governed.end(before, plan)
                except Exception:
                    log.exception("sandbox %s: what served %s is left to the sweep", self._sandbox.key, plan.target)
