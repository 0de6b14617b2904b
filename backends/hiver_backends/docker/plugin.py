"""The isolation plug-in `docker`: sandboxes as containers of a Docker Engine on this host."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from hiver_backends.linux import seccomp
from hiver_backends.linux.isolation import LinuxIsolation, checked_id, finished
from hiverd.contracts.errors import (
    BackendError,
    ConflictError,
    HiverError,
    NotFoundError,
    SandboxGoneError,
    UnavailableError,
)
from hiverd.contracts.isolation import (
    BackendContext,
    Finding,
    Image,
    Progress,
    Workload,
    WorkloadSpec,
)

from . import documents, guarantees, podman, settings, takeover, trial
from .afterwards import Afterwards
from .engine import EngineApi
from .groups import ContainerCgroups
from .images import Images, Prepared
from .places import Places
from .probe import Offer, look
from .programs import Programs
from .workload import DockerWorkload, Identity


class DockerIsolation(LinuxIsolation):
    """One per server. See the package's other modules for each part; this one puts them together."""

    name: ClassVar[str] = "docker"

    def __init__(self, context: BackendContext) -> None:
        """Raises `InvalidError` naming a wrong option."""
        self._settings = settings.parse(context.options)
        self._seccomp = seccomp.load(self._settings.seccomp, "docker")
        self._engine = EngineApi(settings.endpoint(self._settings), self._settings.timeout_seconds)
        self._cgroups = ContainerCgroups(context.instance)
        super().__init__(context, self._cgroups, self._settings.parallelism)
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
        self._afterwards = Afterwards(lambda sandbox_id: self.destroy(sandbox_id, None))
        self._started: _Started | None = None

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
            self._begin_to_reap()
            programs = Programs(self.context.run_dir / "x", offer.conmon, self._shared, self._settings.log_max_bytes)
            init = offer.init
            self._started = _Started(offer, programs)
            await self._in_pool(lambda: self._prepare_folders(programs, init))
            await self._sweep_passing()
            await trial.run(self, self.context.data_dir / "trial", seccomp=self._started.seccomp)
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
        self._seccomp_file.write_text(json.dumps(self._seccomp))

    async def close(self) -> None:
        await self._afterwards.close()
        await self._engine.close()
        if self._started is not None:
            self._started.programs.close()
            self._started = None
        await self._close_shared()
        with contextlib.suppress(OSError):
            self._folders.mount.rmdir()

    async def resolve_image(self, name: str, progress: Progress) -> Image:
        self._ready()
        return await self._images.resolve(name, progress)

    async def create(self, spec: WorkloadSpec) -> Workload:
        started = self._ready()
        places = self._folders.of(checked_id(spec.sandbox_id))
        async with self._builds:
            try:
                prepared = await self._images.prepared(spec.image.handle)
                await self._in_pool(lambda: _make_places(places, spec.sandbox_id))
                container = await self._make_container(spec, prepared, started)
                return await self._in_pool(lambda: self._take_over(spec, prepared, places, container))
            except OSError as error:
                raise BackendError(f"the sandbox cannot be made: {error}") from error
            except UnavailableError:
                self._afterwards.remove(spec.sandbox_id)
                raise

    async def _make_container(self, spec: WorkloadSpec, prepared: Prepared, started: _Started) -> dict[str, Any]:
        """The container, its process 1 waiting. Answers what the Engine says of it."""
        name = documents.container_name(self.context.instance, spec.sandbox_id)
        layout = documents.Layout(
            instance=self.context.instance,
            image=prepared.engine_id,
            init=str(self._init),
            runtime=self._settings.runtime,
            seccomp=self._seccomp if started.seccomp else None,
            swap_limit=bool(started.offer.info.get("SwapLimit")),
            ipv6=started.ipv6,
        )
        config = documents.container(spec, layout)
        if started.offer.podman:
            config = podman.container(config, self._seccomp_file)
        # A request that is given up goes on in the Engine: what it makes must not come after its own removal.
        try:
            container_id = await finished(self._engine.create(name, config))
        except NotFoundError:
            if prepared.layers is None:
                raise
            await self._images.load_empty()  # someone has pruned images; it is the same again, by its content
            container_id = await finished(self._engine.create(name, config))
        await finished(self._engine.start(container_id))
        return await self._engine.inspect(container_id)

    def _take_over(
        self, spec: WorkloadSpec, prepared: Prepared, places: Places, container: Mapping[str, Any]
    ) -> DockerWorkload:
        """Gives the container its root file system, with the mounts in it."""
        started = self._ready()
        found = takeover.identify(container)
        identity = found.identity
        try:
            self._cgroups.register(spec.sandbox_id, identity.pid)
            takeover.give_root(self._shared.rootfs, spec, prepared, container, found, places)
            return DockerWorkload(spec, identity, found.descriptor, places, started.programs.of(identity))
        except BaseException:
            os.close(found.descriptor)
            raise

    async def adopt(self, spec: WorkloadSpec, state: Mapping[str, Any]) -> Workload:
        started = self._ready()
        identity, descriptor = await self._find_again(spec, state, Identity)
        try:
            self._cgroups.register(spec.sandbox_id, identity.pid)
            tools = await self._in_pool(lambda: started.programs.of(identity))
            await self._thaw(spec.sandbox_id)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, ProcessLookupError):
                raise SandboxGoneError(f"sandbox {spec.sandbox_id} has ended") from error
            raise
        return DockerWorkload(spec, identity, descriptor, self._folders.of(spec.sandbox_id), tools)

    async def destroy(self, sandbox_id: str, state: Mapping[str, Any] | None) -> None:
        self._ready()
        places = self._folders.of(checked_id(sandbox_id))
        name = documents.container_name(self.context.instance, sandbox_id)
        removal = asyncio.ensure_future(self._engine.remove(name))
        try:
            await self._while_reaping(sandbox_id, removal)
        finally:
            removal.cancel()
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

    @property
    def _seccomp_file(self) -> Path:
        """The system call filter, for an Engine that reads it itself."""
        return self.context.data_dir / "seccomp.json"

    def _ready(self) -> _Started:
        if self._started is None:
            raise UnavailableError("the isolation plug-in docker has not been started")
        return self._started


class _Started:
    """What exists from `start` to `close`."""

    def __init__(self, offer: Offer, programs: Programs) -> None:
        self.offer = offer
        self.programs = programs
        self.seccomp = guarantees.has_seccomp(offer.info)
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
