"""The isolation plug-in `oci`: sandboxes as OCI containers, without a daemon."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from hiver_backends.linux import bundle, inside, livemounts, pids, seccomp, syscalls
from hiver_backends.linux.cgroups import Cgroups
from hiver_backends.linux.conmon import Conmon
from hiver_backends.linux.execs import Execs
from hiver_backends.linux.isolation import LinuxIsolation, checked_id
from hiver_backends.linux.runtime import Runtime, RuntimeCalls
from hiver_backends.linux.tools import find_program
from hiver_backends.linux.trial import Trial
from hiverd.contracts.errors import BackendError, ConflictError, UnavailableError
from hiverd.contracts.isolation import (
    BackendContext,
    Finding,
    Image,
    Progress,
    Workload,
    WorkloadSpec,
)

from . import settings
from .cleanup import CREATED_MARK, Cleaner
from .images import Images
from .probe import Offer, look
from .workload import Engine, Identity, OciWorkload, Places


class OciIsolation(LinuxIsolation):
    """One per server. See the package's other modules for each part; this one puts them together."""

    name: ClassVar[str] = "oci"

    def __init__(self, context: BackendContext) -> None:
        """Raises `InvalidError` naming a wrong option."""
        self._settings = settings.parse(context.options)
        self._seccomp = seccomp.load(self._settings.seccomp, "oci")
        self._cgroups = Cgroups(context.instance)
        super().__init__(context, self._cgroups, self._settings.parallelism)
        self._images = Images(
            context.data_dir / "images", self._settings, context.image_aliases, self._children, self._pool
        )
        self._started: _Started | None = None
        self._swap_limit = False

    async def probe(self) -> list[Finding]:
        return (await self._look()).findings

    async def start(self) -> None:
        await self._in_pool(lambda: self._trial().sweep())
        offer = await self._look()
        missing = [finding for finding in offer.findings if finding.required and not finding.ok]
        if missing or offer.runtime is None or offer.conmon is None or offer.init is None:
            texts = [f"{finding.name}: {finding.detail} -> {finding.remedy}" for finding in missing]
            raise UnavailableError("the isolation plug-in oci cannot work here: " + "; ".join(texts))
        self._begin_to_reap()
        calls = RuntimeCalls(offer.runtime, self._state_dir, self._children)
        execs = Execs(self.context.run_dir / "x", calls, self._children, self._pool)
        conmon = Conmon(offer.conmon, calls, self._children, self._settings.log_max_bytes)
        engine = Engine(
            calls=calls,
            conmon=conmon,
            execs=execs,
            shared=self._shared,
        )
        folders = Places(run=self.context.run_dir / "s", log=self.context.data_dir / "sandboxes", mount=self._mount_dir)
        cleaner = Cleaner(folders, self._state_dir, self._cgroups, offer.runtime)
        self._started = _Started(engine, cleaner, offer.runtime, offer.init)
        try:
            await self._in_pool(lambda: self._prepare_folders(folders, execs))
        except BaseException:
            await self.close()
            raise

    def _prepare_folders(self, folders: Places, execs: Execs) -> None:
        for folder in (folders.run, folders.log, self._state_dir):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        execs.prepare()
        self._images.prepare()
        self._cgroups.prepare()
        self._swap_limit = self._cgroups.has_swap_limit()

    async def close(self) -> None:
        await self._images.close()
        if self._started is not None:
            self._started.engine.calls.close()
            self._started = None
        await self._close_shared()
        if not self._cgroups.owned():
            self._cgroups.remove_parent()
        with contextlib.suppress(OSError):
            self._mount_dir.rmdir()

    async def resolve_image(self, name: str, progress: Progress) -> Image:
        return await self._images.resolve(name, progress)

    async def create(self, spec: WorkloadSpec) -> Workload:
        started = self._ready()
        places = started.cleaner.places(checked_id(spec.sandbox_id))
        host_id = settings.host_id(self._settings, spec.slot) if started.runtime.userns else None
        async with self._builds:
            try:
                await self._in_pool(lambda: self._build(spec, places, host_id))
                pid = await started.engine.conmon.create(spec.sandbox_id, places.main)
                identity, descriptor = await self._in_pool(lambda: self._take_over(places, pid, host_id))
            except OSError as error:
                raise BackendError(f"the sandbox cannot be made: {error}") from error
        return OciWorkload(spec, identity, descriptor, places, started.engine)

    def _build(self, spec: WorkloadSpec, places: Places, host_id: int | None) -> None:
        """Everything that the runtime needs: root file system, identity, mounts and configuration."""
        started = self._ready()
        try:
            places.run.mkdir(mode=0o700)
        except FileExistsError:
            raise ConflictError(f"something of sandbox {spec.sandbox_id} exists already") from None
        places.log.mkdir(mode=0o700, exist_ok=True)
        owner = (host_id or 0, host_id or 0)
        target = places.rootfs
        places.mount.mkdir(mode=0o700)
        os.chown(places.mount, *owner)
        etc = inside.identity(spec.hostname, spec.extra_hosts)
        self._shared.rootfs.mount(self._images.layers(spec.image.handle), spec.volume, target, host_id, etc)
        root = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            livemounts.attach_all(self._shared.rootfs, root, spec.mounts, host_id)
            os.close(inside.make_directory(root, spec.cwd or "/", owner))
        finally:
            os.close(root)
        layout = bundle.Layout(
            rootfs=str(target),
            init=started.init,
            cgroups_path=self._cgroups.path(spec.sandbox_id),
            host_id=host_id,
            unified_cgroups=self._cgroups.unified,
            swap_limit=self._swap_limit,
            seccomp=self._seccomp,
            tty_session=spec.tty and bool(spec.argv),
        )
        document = msgspec.json.encode(bundle.configuration(spec, layout))
        syscalls.write_new_file(str(places.run / "config.json"), document, mode=0o600)

    def _take_over(self, places: Places, pid: int, host_id: int | None) -> tuple[Identity, int]:
        """Once the runtime has made the container: what the host no longer needs goes."""
        started = self._ready()
        descriptor = os.pidfd_open(pid)
        try:
            stat = pids.read_stat(pid)
            if stat is None or pids.has_ended(descriptor):
                raise BackendError("the sandbox ended while it was made")
            for number in (1, 2):
                # The pipes to conmon: so that the entrypoint can open /dev/stdout and /dev/stderr.
                with contextlib.suppress(OSError):
                    os.chown(f"/proc/{pid}/fd/{number}", host_id or 0, host_id or 0)
            if started.runtime.kind != "runsc":
                # The sandbox's mount namespace has its own copy. On the host it would slow down every other create.
                # The empty folder stays: runc wants it as its working directory when it runs a command.
                syscalls.umount(str(places.rootfs))
            # It holds the environment, and with it perhaps secrets; the runtime has read it.
            if started.runtime.kind == "runc":
                (places.run / "config.json").unlink()
            (places.run / CREATED_MARK).touch()
        except BaseException:
            os.close(descriptor)
            raise
        identity = Identity(pid=pid, start_ticks=stat.start_ticks, boot_id=pids.boot_id(), host_id=host_id)
        return identity, descriptor

    async def adopt(self, spec: WorkloadSpec, state: Mapping[str, Any]) -> Workload:
        started = self._ready()
        identity, descriptor = await self._find_again(spec, state, Identity)
        await self._thaw(spec.sandbox_id)
        return OciWorkload(spec, identity, descriptor, started.cleaner.places(spec.sandbox_id), started.engine)

    async def destroy(self, sandbox_id: str, state: Mapping[str, Any] | None) -> None:
        cleaner = self._ready().cleaner
        checked_id(sandbox_id)
        removal = asyncio.ensure_future(self._in_pool(lambda: cleaner.destroy(sandbox_id)))
        if await self._while_reaping(sandbox_id, removal):
            self._children.reap_orphans(partial(self._cgroups.contains, sandbox_id))
        self._children.reap_orphans_later()

    async def list_owned(self) -> frozenset[str]:
        return await self._in_pool(self._ready().cleaner.owned)

    @property
    def _state_dir(self) -> Path:
        return self.context.run_dir / "state"

    @property
    def _mount_dir(self) -> Path:
        """Sandboxes' roots pass through here while they are made; each in a folder that only that root may enter."""
        return Path("/run", f"hiver-{self.context.instance}")

    async def _look(self) -> Offer:
        return await self._in_pool(self._look_blocking)

    def _look_blocking(self) -> Offer:
        for folder in (self.context.data_dir, self.context.run_dir):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._mount_dir.mkdir(mode=0o711, exist_ok=True)
        memory = self.context.data_dir / "probe.json"
        return look(self._settings, self.context.run_dir, memory, self._trial())

    def _trial(self) -> Trial:
        init = find_program(self._settings.init) or ""
        first_id = self._settings.userns_base
        return Trial(self._mount_dir, init, self._cgroups, self._shared.rootfs, self._seccomp, first_id)

    def _ready(self) -> _Started:
        if self._started is None:
            raise UnavailableError("the isolation plug-in oci has not been started")
        return self._started


class _Started:
    """What exists from `start` to `close`."""

    def __init__(self, engine: Engine, cleaner: Cleaner, runtime: Runtime, init: str) -> None:
        self.engine = engine
        self.cleaner = cleaner
        self.runtime = runtime
        self.init = init
