"""Test doubles of an isolation plug-in, named after how they behave. No engine: for tests of the core alone."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, ClassVar, Literal

from hiverd.contracts.errors import BackendError, NotFoundError, SandboxGoneError
from hiverd.contracts.isolation import (
    BackendContext,
    ExecProcess,
    ExecSpec,
    Finding,
    Image,
    Isolation,
    LogChunk,
    Mount,
    Progress,
    RootChanges,
    Stream,
    Terminal,
    Usage,
    Workload,
    WorkloadExit,
    WorkloadSpec,
)


class FakeProcess(ExecProcess):
    """Prints its argv joined by blanks and exits with 0; `wait-for-kill` runs until it is killed."""

    def __init__(self, spec: ExecSpec) -> None:
        self.spec = spec
        self.written: list[bytes] = []
        self.closed = False
        self._killed = asyncio.Event()
        self._endless = "wait-for-kill" in spec.argv

    async def output(self) -> AsyncIterator[tuple[Stream, bytes]]:
        yield "stdout", " ".join(self.spec.argv).encode() + b"\n"
        if self._endless:
            await self._killed.wait()

    async def write(self, data: bytes) -> None:
        if self.closed:
            raise NotFoundError("closed")
        self.written.append(data)

    def resize(self, rows: int, cols: int) -> None:
        self.written.append(b"%dx%d" % (rows, cols))

    async def wait(self) -> int:
        if self._endless:
            await self._killed.wait()
            return 137
        return 0

    async def kill(self) -> None:
        self._killed.set()

    async def close(self) -> None:
        self._killed.set()
        self.closed = True


class FakeWorkload(Workload):
    """Lives until it is stopped, or until a test calls `end`."""

    def __init__(self, spec: WorkloadSpec) -> None:
        self.sandbox_id = spec.sandbox_id
        self.spec = spec
        self.begun = False
        self.pauses = 0
        self.resumes = 0
        self.processes: list[FakeProcess] = []
        self.mounts = {mount.target: mount for mount in spec.mounts}
        self.log: list[LogChunk] = []
        self._exit: asyncio.Future[WorkloadExit] = asyncio.get_running_loop().create_future()

    @property
    def state(self) -> dict[str, Any]:
        return {"id": self.sandbox_id}

    @property
    def network_namespace(self) -> str | None:
        return None

    def open_root(self) -> int:
        """An empty folder on the volume: never the host's own root."""
        root = self.spec.volume / "fake-root"
        root.mkdir(parents=True, exist_ok=True)
        return os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def open_process(self) -> int:
        return os.pidfd_open(os.getpid())

    @property
    def root_ids(self) -> tuple[int, int]:
        return os.getuid(), os.getgid()

    async def begin(self) -> None:
        self.begun = True

    async def wait(self) -> WorkloadExit:
        return await asyncio.shield(self._exit)

    def end(self, exit_code: int) -> None:
        if not self._exit.done():
            self._exit.set_result(WorkloadExit(exit_code))

    async def exec(self, spec: ExecSpec) -> ExecProcess:
        process = FakeProcess(spec)
        self.processes.append(process)
        return process

    async def entrypoint_output(self, position: str | None) -> AsyncIterator[LogChunk]:
        for chunk in self.log[int(position or 0) :]:
            yield chunk
        await self.wait()

    def terminal(self) -> Terminal | None:
        return None

    async def usage(self) -> Usage:
        return Usage(cpu_seconds=1.0, memory_bytes=1 << 20)

    async def listening_ports(self) -> frozenset[int]:
        return frozenset({8080})

    async def add_mount(self, mount: Mount) -> None:
        if "refused" in mount.target:
            raise BackendError("this mount is refused")
        self.mounts[mount.target] = mount

    async def remove_mount(self, target: str) -> None:
        self.mounts.pop(target, None)

    async def mounted_targets(self) -> frozenset[str]:
        return frozenset(self.mounts)

    async def pause(self) -> frozenset[int]:
        self.pauses += 1
        return frozenset()

    async def resume(self) -> None:
        self.resumes += 1

    async def stop(self, grace_seconds: float) -> None:
        self.end(143)


class FakeIsolation(Isolation):
    """Keeps workloads in memory. `hook` is awaited at `create`, `begin`, `destroy` and `adopt`: raise or wait there."""

    name: ClassVar[str] = "fake"
    kind: ClassVar[Literal["container", "microvm"]] = "container"

    def __init__(self, context: BackendContext) -> None:
        super().__init__(context)
        self.workloads: dict[str, FakeWorkload] = {}
        self.destroyed: list[str] = []
        self.hook: Callable[[str], Any] | None = None

    async def _pass(self, step: str) -> None:
        if self.hook is not None:
            await self.hook(step)

    async def probe(self) -> list[Finding]:
        return []

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def resolve_image(self, name: str, progress: Progress) -> Image:
        if name == "missing":
            raise NotFoundError('image "missing" does not exist')
        return Image(reference=name, handle=name)

    async def create(self, spec: WorkloadSpec) -> Workload:
        workload = self.workloads[spec.sandbox_id] = FakeWorkload(spec)
        await self._pass("create")
        return workload

    async def adopt(self, spec: WorkloadSpec, state: Mapping[str, Any]) -> Workload:
        await self._pass("adopt")
        if spec.sandbox_id not in self.workloads:
            raise SandboxGoneError("it has ended")
        return self.workloads[spec.sandbox_id]

    async def destroy(self, sandbox_id: str, state: Mapping[str, Any] | None) -> None:
        await self._pass("destroy")
        workload = self.workloads.pop(sandbox_id, None)
        if workload is not None:
            workload.end(137)
        self.destroyed.append(sandbox_id)

    async def root_changes(self, spec: WorkloadSpec, state: Mapping[str, Any]) -> RootChanges | None:
        """`fake-upper` on the volume: what a test puts there, the sandbox has written."""
        upper = spec.volume / "fake-upper"
        upper.mkdir(exist_ok=True)
        return RootChanges(upper=str(upper), first_id=os.getuid(), id_count=1)

    async def list_owned(self) -> frozenset[str]:
        return frozenset(self.workloads)
