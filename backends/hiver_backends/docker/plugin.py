"""The isolation plug-in `docker`: sandboxes as containers of a Docker Engine on this host."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, TypeVar

import msgspec

from hiver_backends.linux import pids, seccomp, syscalls
from hiver_backends.linux.children import Children
from hiver_backends.linux.inotify import Inotify
from hiver_backends.linux.rootfs import RootFs, root_changes
from hiver_backends.linux.userns import UserNamespaces
from hiver_backends.linux.workload import Shared
from hiverd.contracts.errors import (
    BackendError,
    ConflictError,
    HiverError,
    InvalidError,
    NotFoundError,
    SandboxGoneError,
    UnavailableError,
)
from hiverd.contracts.isolation import (
    BackendContext,
    Finding,
    Image,
    Isolation,
    Progress,
    RootChanges,
    Workload,
    WorkloadSpec,
)

from . import documents, settings, takeover, trial
from .engine import EngineApi
from .groups import ContainerCgroups
from .images import Images, Prepared
from .places import Places
from .probe import Offer, look
from .programs import Programs
from .workload import DockerWorkload, Identity

_SANDBOX_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}")
_ORPHANS_SECONDS: Final = 0.1
_T = TypeVar("_T")


class DockerIsolation(Isolation):
    """One per server. See the package's other modules for each part; this one puts them together."""

    name: ClassVar[str] = "docker"
    kind: ClassVar[Literal["container", "microvm"]] = "container"

    def __init__(self, context: BackendContext) -> None:
        """Raises `InvalidError` naming a wrong option."""
        super().__init__(context)
        self._settings = settings.parse(context.options)
        self._seccomp = seccomp.load(self._settings.seccomp, "docker")
        self._engine = EngineApi(settings.endpoint(self._settings), self._settings.timeout_seconds)
        self._cgroups = ContainerCgroups(context.instance)
        self._namespaces = UserNamespaces()
        self._rootfs = RootFs(self._namespaces)
        self._pool: Final = ThreadPoolExecutor(2 * _processors() + 8, thread_name_prefix="docker")
        self._children = Children(self._cgroups.contains_any)
        self._inotify = Inotify()
        self._images = Images(
            context.data_dir / "images",
            context.instance,
            self._settings,
            context.image_aliases,
            self._engine,
            self._pool,
        )
        self._folders = Places(
            run=context.run_dir / "s",
            log=context.data_dir / "sandboxes",
            mount=Path("/run", f"hiver-{context.instance}-docker"),
        )
        self._builds = asyncio.Semaphore(self._settings.parallelism or min(64, 8 * _processors()))
        self._started: _Started | None = None
        self._was_subreaper = False

    async def probe(self) -> list[Finding]:
        try:
            return (await look(self._settings, self._engine, self.context.run_dir, self._in_pool)).findings
        finally:
            if self._started is None:
                await self._engine.close()

    async def start(self) -> None:
        try:
            offer = await look(self._settings, self._engine, self.context.run_dir, self._in_pool)
            missing = [finding for finding in offer.findings if finding.required and not finding.ok]
            if missing or offer.conmon is None or offer.init is None:
                texts = [f"{finding.name}: {finding.detail} -> {finding.remedy}" for finding in missing]
                raise UnavailableError("the isolation plug-in docker cannot work here: " + "; ".join(texts))
            self._was_subreaper = syscalls.set_child_subreaper(True)
            shared = Shared(
                children=self._children,
                cgroups=self._cgroups,
                inotify=self._inotify,
                rootfs=self._rootfs,
                pool=self._pool,
            )
            programs = Programs(self.context.run_dir / "x", offer.conmon, shared, self._settings.log_max_bytes)
            init = offer.init
            self._started = _Started(offer, programs)
            await self._in_pool(lambda: self._prepare_folders(programs, init))
            await self._sweep_passing()
            await trial.run(self, self.context.data_dir / "trial")
        except BaseException:
            await self.close()
            raise

    def _prepare_folders(self, programs: Programs, init: str) -> None:
        for folder in (self._folders.run, self._folders.log):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folders.mount.mkdir(mode=0o711, exist_ok=True)
        programs.prepare()
        self._images.prepare()
        _copy_program(Path(init), self._init)

    async def close(self) -> None:
        await self._engine.close()
        if self._started is not None:
            self._started.programs.close()
            self._started = None
            syscalls.set_child_subreaper(self._was_subreaper)
        # No command is about to be watched any more, so no orphan needs time to settle.
        self._children.reap_orphans(lambda _: True)
        self._children.close()
        self._inotify.close()
        # Waits for what is under way: a thread in the middle of a mount must not be left behind.
        await asyncio.get_running_loop().run_in_executor(None, self._pool.shutdown)
        self._namespaces.close()
        with contextlib.suppress(OSError):
            self._folders.mount.rmdir()

    async def resolve_image(self, name: str, progress: Progress) -> Image:
        self._ready()
        return await self._images.resolve(name, progress)

    async def create(self, spec: WorkloadSpec) -> Workload:
        started = self._ready()
        places = self._folders.of(_checked_id(spec.sandbox_id))
        async with self._builds:
            try:
                prepared = await self._images.prepared(spec.image.handle)
                await self._in_pool(lambda: _make_places(places, spec.sandbox_id))
                container = await self._make_container(spec, prepared, started)
                return await self._in_pool(lambda: self._take_over(spec, prepared, places, container))
            except OSError as error:
                raise BackendError(f"the sandbox cannot be made: {error}") from error

    async def _make_container(self, spec: WorkloadSpec, prepared: Prepared, started: _Started) -> dict[str, Any]:
        """The container, its process 1 waiting. Answers what the Engine says of it."""
        name = documents.container_name(self.context.instance, spec.sandbox_id)
        layout = documents.Layout(
            instance=self.context.instance,
            image=prepared.engine_id,
            init=str(self._init),
            runtime=self._settings.runtime,
            seccomp=self._seccomp,
            swap_limit=bool(started.offer.info.get("SwapLimit")),
            ipv6=started.ipv6,
        )
        config = documents.container(spec, layout)
        # A request that is given up goes on in the Engine: what it makes must not come after its own removal.
        try:
            container_id = await _finished(self._engine.create(name, config))
        except NotFoundError:
            if prepared.layers is None:
                raise
            await self._images.load_empty()  # someone has pruned images; it is the same again, by its content
            container_id = await _finished(self._engine.create(name, config))
        await _finished(self._engine.start(container_id))
        return await self._engine.inspect(container_id)

    def _take_over(
        self, spec: WorkloadSpec, prepared: Prepared, places: Places, container: Mapping[str, Any]
    ) -> DockerWorkload:
        """Gives the container its root file system, with the mounts in it."""
        started = self._ready()
        identity, descriptor = takeover.identify(container)
        try:
            self._cgroups.register(spec.sandbox_id, identity.pid)
            takeover.give_root(self._rootfs, spec, prepared, container, identity, places)
            return DockerWorkload(spec, identity, descriptor, places, started.programs.of(identity))
        except BaseException:
            os.close(descriptor)
            raise

    async def adopt(self, spec: WorkloadSpec, state: Mapping[str, Any]) -> Workload:
        started = self._ready()
        try:
            identity = msgspec.convert(dict(state), Identity)
        except msgspec.ValidationError as error:
            raise BackendError(f"the stored state of sandbox {spec.sandbox_id} cannot be read: {error}") from error
        gone = SandboxGoneError(f"sandbox {spec.sandbox_id} has ended")
        if identity.boot_id != pids.boot_id():
            raise gone
        descriptor = pids.open_verified(identity.pid, identity.start_ticks)
        if descriptor is None:
            raise gone
        try:
            if pids.has_ended(descriptor):
                raise gone
            self._cgroups.register(spec.sandbox_id, identity.pid)
            tools = await self._in_pool(lambda: started.programs.of(identity))
        except ProcessLookupError:
            os.close(descriptor)
            raise gone from None
        except BaseException:
            os.close(descriptor)
            raise
        # Whoever paused it may have been killed since.
        await self._in_pool(lambda: self._cgroups.thaw(spec.sandbox_id))
        return DockerWorkload(spec, identity, descriptor, self._folders.of(spec.sandbox_id), tools)

    async def root_changes(self, spec: WorkloadSpec, state: Mapping[str, Any]) -> RootChanges | None:
        return root_changes(spec.volume, state.get("host_id"))

    async def destroy(self, sandbox_id: str, state: Mapping[str, Any] | None) -> None:
        self._ready()
        places = self._folders.of(_checked_id(sandbox_id))
        inside_it = partial(self._cgroups.contains, sandbox_id)
        name = documents.container_name(self.context.instance, sandbox_id)
        job = asyncio.ensure_future(self._engine.remove(name))
        try:
            while not (await asyncio.wait({job}, timeout=_ORPHANS_SECONDS))[0]:
                # An unreaped orphan of ours inside holds up the end of its pid namespace.
                self._children.reap_orphans(inside_it)
        finally:
            job.cancel()
        await job
        await self._in_pool(places.remove)
        self._cgroups.forget(sandbox_id)
        self._children.reap_orphans_later()

    async def list_owned(self) -> frozenset[str]:
        self._ready()
        return frozenset(name for name in await self._all_ids() if not name.startswith(documents.PASSING_PREFIX))

    async def _all_ids(self) -> set[str]:
        found = await self._engine.labelled(documents.INSTANCE_LABEL, self.context.instance)
        names = {labels.get(documents.SANDBOX_LABEL, "") for labels in found}
        return (names | await self._in_pool(self._folders.owned)) - {""}

    async def _sweep_passing(self) -> None:
        """Removes what trials and readings of killed servers have left."""
        for name in await self._all_ids():
            if name.startswith(documents.PASSING_PREFIX):
                with contextlib.suppress(HiverError):
                    await self.destroy(name, None)

    @property
    def _init(self) -> Path:
        """The init program as the Engine mounts it: where this server is in a container itself, the data folder is what
        has the same path for both."""
        return self.context.data_dir / "init"

    def _ready(self) -> _Started:
        if self._started is None:
            raise UnavailableError("the isolation plug-in docker has not been started")
        return self._started

    async def _in_pool(self, work: Callable[[], _T]) -> _T:
        """Work in a thread cannot be cancelled: whoever cancels us waits for its end, so that nothing goes on behind
        the back of the `destroy` that follows."""
        return await _finished(asyncio.get_running_loop().run_in_executor(self._pool, work))


class _Started:
    """What exists from `start` to `close`."""

    def __init__(self, offer: Offer, programs: Programs) -> None:
        self.offer = offer
        self.programs = programs
        self.ipv6 = Path("/proc/sys/net/ipv6").is_dir()


def _make_places(places: Places, sandbox_id: str) -> None:
    try:
        places.make()
    except FileExistsError:
        raise ConflictError(f"something of sandbox {sandbox_id} exists already") from None


def _copy_program(source: Path, target: Path) -> None:
    content = source.read_bytes()
    if target.exists() and target.read_bytes() == content:
        return
    fresh = target.with_name(f"{target.name}.new")
    fresh.write_bytes(content)
    fresh.chmod(0o755)
    fresh.rename(target)  # running sandboxes keep the old one


async def _finished(work: Awaitable[_T]) -> _T:
    """The outcome of work that goes on when nobody waits for it: whoever cancels us waits for its end."""
    job = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        await asyncio.wait({job})
        if not job.cancelled():
            job.exception()
        raise


def _checked_id(sandbox_id: str) -> str:
    if _SANDBOX_ID.fullmatch(sandbox_id) is None:
        raise InvalidError(f"{sandbox_id!r} is no sandbox id")
    return sandbox_id


def _processors() -> int:
    return len(os.sched_getaffinity(0))
