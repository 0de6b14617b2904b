"""A running container as the core holds it: what is the same whoever made it."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import signal
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, Final, TypeVar

from msgspec import Struct

from hiverd.contracts.errors import BackendError, SandboxGoneError, UnavailableError, UnsupportedError
from hiverd.contracts.isolation import ExecProcess, ExecSpec, Mount, Terminal, Usage, Workload, WorkloadSpec

from . import bundle, livemounts, network, pids
from .cgroups import Cgroups
from .children import Child, Children
from .execs import ExecRequest, Execs
from .inotify import Inotify
from .killing import ProcessTree
from .rootfs import RootFs
from .terminal import EntryTerminal

_FREEZE_SECONDS: Final = 1.0
_ORPHANS_SECONDS: Final = 0.1
_T = TypeVar("_T")


class Shared(Struct, frozen=True, kw_only=True):
    """What all workloads of one server share."""

    children: Children
    cgroups: Cgroups
    inotify: Inotify
    rootfs: RootFs
    pool: Executor


class Process(Struct, frozen=True, kw_only=True):
    """Process 1 of a container."""

    pid: int
    descriptor: int
    """A pidfd; the workload owns it."""
    host_id: int | None
    """Host id of the container's root user; None: no user namespace."""


class ContainerWorkload(Workload):
    """`container_id` is the runtime's name of the container."""

    def __init__(self, spec: WorkloadSpec, process: Process, container_id: str, execs: Execs, shared: Shared) -> None:
        self.sandbox_id = spec.sandbox_id
        self._spec = spec
        self._pid = process.pid
        self._host_id = process.host_id
        self._descriptor: int | None = process.descriptor
        self._container_id = container_id
        self._execs = execs
        self._shared = shared
        self._mounts = {mount.target: mount.source for mount in spec.mounts}
        self._ended: asyncio.Future[bool] | None = None
        self._oom_kills = 0
        self._terminal: EntryTerminal | None = None

    @property
    def network_namespace(self) -> str | None:
        return f"/proc/{self._pid}/ns/net"

    @property
    def root_ids(self) -> tuple[int, int]:
        first = self._host_id or 0
        return (first, first)

    def open_root(self) -> int:
        try:
            descriptor = os.open(f"/proc/{self._pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise SandboxGoneError(f"sandbox {self.sandbox_id} has ended") from error
        # Only now is it sure that the pid was still ours when the path was followed.
        if self._has_ended():
            os.close(descriptor)
            raise SandboxGoneError(f"sandbox {self.sandbox_id} has ended")
        return descriptor

    def open_process(self) -> int:
        if self._descriptor is None or self._has_ended():
            raise SandboxGoneError(f"sandbox {self.sandbox_id} has ended")
        return os.dup(self._descriptor)

    async def pause(self) -> frozenset[int]:
        try:
            frozen = await self._in_pool(lambda: self._shared.cgroups.freeze(self.sandbox_id, _FREEZE_SECONDS))
        except FileNotFoundError:
            if self._has_ended():
                raise SandboxGoneError(f"sandbox {self.sandbox_id} has ended") from None
            raise UnsupportedError("this host has no control group freezer, so a sandbox cannot be paused") from None
        if not frozen:
            raise UnavailableError("the sandbox could not be paused in time")
        return frozenset(self._shared.cgroups.members(self.sandbox_id))

    async def resume(self) -> None:
        await self._in_pool(lambda: self._shared.cgroups.thaw(self.sandbox_id))

    async def exec(self, spec: ExecSpec) -> ExecProcess:
        if self._has_ended():
            raise SandboxGoneError(f"sandbox {self.sandbox_id} has ended")
        request = ExecRequest(
            sandbox_id=self._container_id,
            process=self._exec_document(spec),
            owner=self.root_ids,
            stdin=spec.stdin,
        )
        try:
            return await self._execs.start(request, self._process_tree)
        except BackendError as error:
            if self._has_ended():
                raise SandboxGoneError(f"sandbox {self.sandbox_id} has ended") from error
            raise

    def _exec_document(self, spec: ExecSpec) -> dict[str, Any]:
        """The OCI process document of a command."""
        return bundle.exec_process(spec, self._spec)

    def _process_tree(self, _: str, child: Child) -> ProcessTree:
        return ProcessTree(self._shared.cgroups, self.sandbox_id, child)

    def terminal(self) -> Terminal | None:
        return self._terminal

    async def usage(self) -> Usage:
        try:
            return await self._in_pool(lambda: self._shared.cgroups.usage(self.sandbox_id))
        except (OSError, KeyError, ValueError) as error:
            if self._has_ended():
                raise SandboxGoneError(f"sandbox {self.sandbox_id} has ended") from error
            raise BackendError(f"the usage of sandbox {self.sandbox_id} cannot be read") from error

    async def listening_ports(self) -> frozenset[int]:
        try:
            return await self._in_pool(lambda: network.listening_ports(self._pid))
        except OSError as error:
            raise SandboxGoneError(f"sandbox {self.sandbox_id} has ended") from error

    async def add_mount(self, mount: Mount) -> None:
        shared, pid, host_id = self._shared, self._pid, self._host_id
        await self._in_pool(lambda: livemounts.attach_live(shared.rootfs, pid, self.open_root, mount, host_id))
        self._mounts[mount.target] = mount.source

    async def remove_mount(self, target: str) -> None:
        place = (await self._find({target: self._mounts.get(target, "")})).get(target)
        if place is not None:
            await self._in_pool(lambda: self._take_away(place))
        self._mounts.pop(target, None)

    def _take_away(self, place: str) -> None:
        try:
            livemounts.detach_live(self._pid, self.open_root, place)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # The kernel locks what was there when the user namespace was made (mount_namespaces(7)), for us as well.
            # An empty folder over it hides it for good: inside, nobody may take that away.
            empty = self._spec.volume / "removed" / secrets.token_hex(4)
            empty.mkdir(mode=0o755, parents=True)
            cover = Mount(target=place, source=str(empty))
            shared, pid, host_id = self._shared, self._pid, self._host_id
            livemounts.attach_live(shared.rootfs, pid, self.open_root, cover, host_id)

    async def mounted_targets(self) -> frozenset[str]:
        return frozenset(await self._find(dict(self._mounts)))

    async def _find(self, targets: dict[str, str]) -> dict[str, str]:
        return await self._in_pool(lambda: livemounts.find(self._pid, self.open_root, targets))

    async def _kill(self) -> None:
        """Until no process of the workload is left."""
        self._signal(signal.SIGKILL)
        shared = self._shared
        while not await self._ends_within(_ORPHANS_SECONDS):
            # An unreaped orphan of ours inside holds up the end of its pid namespace.
            shared.children.reap_orphans(partial(shared.cgroups.contains, self.sandbox_id))
        if self._terminal is not None:
            self._terminal.close()

    async def _ends_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._until_ended()
        except TimeoutError:
            return False
        return True

    def _signal_inside(self, pid: int | None, *numbers: int) -> bool:
        """Signals to one process of the workload; False if it is none, or gone."""
        if pid is None:
            return False
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        try:
            if not self._shared.cgroups.contains(self.sandbox_id, pid):
                return False
            for number in numbers:
                pids.send_signal(descriptor, number)
        finally:
            os.close(descriptor)
        return True

    async def close(self) -> None:
        if self._terminal is not None:
            self._terminal.close()
        if self._descriptor is not None:
            if self._ended is not None and not self._ended.done():
                asyncio.get_running_loop().remove_reader(self._descriptor)
                self._ended.cancel()
            os.close(self._descriptor)
            self._descriptor = None

    def _has_ended(self) -> bool:
        if self._descriptor is None:
            return True
        return pids.has_ended(self._descriptor)

    def _signal(self, number: int) -> None:
        if self._descriptor is not None:
            pids.send_signal(self._descriptor, number)

    async def _until_ended(self) -> None:
        """Any number of callers; one reader in the loop."""
        if self._ended is None:
            if self._descriptor is None:
                return
            loop = asyncio.get_running_loop()
            self._ended = loop.create_future()
            loop.add_reader(self._descriptor, self._on_end)
        await asyncio.shield(self._ended)

    def _on_end(self) -> None:
        if self._descriptor is None or self._ended is None:
            return
        asyncio.get_running_loop().remove_reader(self._descriptor)
        # Now, as the control group goes when the sandbox is destroyed.
        self._oom_kills = max(self._oom_kills, self._shared.cgroups.oom_kills(self.sandbox_id))
        if not self._ended.done():
            self._ended.set_result(True)

    async def _in_pool(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._shared.pool, work)
