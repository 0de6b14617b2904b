"""What the isolation plug-ins for containers have in common: threads, children, ids, finding a sandbox again."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ClassVar, Final, Literal, Protocol, TypeVar

import msgspec

from hiverd.contracts.errors import BackendError, InvalidError, SandboxGoneError
from hiverd.contracts.isolation import BackendContext, Isolation, RootChanges, WorkloadSpec

from . import pids, syscalls
from .cgroups import Cgroups
from .children import Children
from .inotify import Inotify
from .rootfs import RootFs, root_changes
from .userns import UserNamespaces
from .workload import Shared

_SANDBOX_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}")
_ORPHANS_SECONDS: Final = 0.1
_T = TypeVar("_T")


class Recorded(Protocol):
    """A state document: who process 1 of a sandbox was. A pid alone may be another's by now."""

    @property
    def pid(self) -> int: ...
    @property
    def start_ticks(self) -> int: ...
    @property
    def boot_id(self) -> str: ...


_R = TypeVar("_R", bound=Recorded)


class LinuxIsolation(Isolation):
    """Base of the plug-ins. One per server."""

    kind: ClassVar[Literal["container", "microvm"]] = "container"

    def __init__(self, context: BackendContext, cgroups: Cgroups, parallelism: int) -> None:
        """`parallelism`: sandboxes built at the same time; 0 chooses by the number of processors."""
        super().__init__(context)
        self._namespaces = UserNamespaces()
        self._pool: Final = ThreadPoolExecutor(2 * _processors() + 8, thread_name_prefix=self.name)
        self._children = Children(cgroups.contains_any)
        self._shared: Final = Shared(
            children=self._children,
            cgroups=cgroups,
            inotify=Inotify(),
            rootfs=RootFs(self._namespaces),
            pool=self._pool,
        )
        self._builds = asyncio.Semaphore(parallelism or min(64, 8 * _processors()))
        self._was_subreaper: bool | None = None

    def _begin_to_reap(self) -> None:
        """From now on orphans of commands are this process's."""
        self._was_subreaper = syscalls.set_child_subreaper(True)

    async def _close_shared(self) -> None:
        if self._was_subreaper is not None:
            syscalls.set_child_subreaper(self._was_subreaper)
            self._was_subreaper = None
        # No command is about to be watched any more, so no orphan needs time to settle.
        self._children.reap_orphans(lambda _: True)
        self._children.close()
        self._shared.inotify.close()
        # Waits for what is under way: a thread in the middle of a mount must not be left behind.
        await asyncio.get_running_loop().run_in_executor(None, self._pool.shutdown)
        self._namespaces.close()

    async def root_changes(self, spec: WorkloadSpec, state: Mapping[str, Any]) -> RootChanges | None:
        return root_changes(spec.volume, state.get("host_id"))

    async def _find_again(self, spec: WorkloadSpec, state: Mapping[str, Any], kind: type[_R]) -> tuple[_R, int]:
        """The state document, and a pidfd of the process 1 that it is about, for the caller to close.

        Raises `SandboxGoneError` if that has surely ended, `BackendError` for what is no state document.
        """
        try:
            identity = msgspec.convert(dict(state), kind)
        except msgspec.ValidationError as error:
            raise BackendError(f"the stored state of sandbox {spec.sandbox_id} cannot be read: {error}") from error
        descriptor = None
        if identity.boot_id == pids.boot_id():
            descriptor = pids.open_verified(identity.pid, identity.start_ticks)
        if descriptor is not None and pids.has_ended(descriptor):
            os.close(descriptor)
            descriptor = None
        if descriptor is None:
            raise SandboxGoneError(f"sandbox {spec.sandbox_id} has ended")
        return identity, descriptor

    async def _thaw(self, sandbox_id: str) -> None:
        """Whoever paused a sandbox may have been killed since."""
        await self._in_pool(lambda: self._shared.cgroups.thaw(sandbox_id))

    async def _while_reaping(self, sandbox_id: str, removal: asyncio.Future[_T]) -> _T:
        """The outcome of a removal. An unreaped orphan of ours inside holds up the end of a pid namespace."""
        inside = partial(self._shared.cgroups.contains, sandbox_id)
        while not (await asyncio.wait({removal}, timeout=_ORPHANS_SECONDS))[0]:
            self._children.reap_orphans(inside)
        return await removal

    async def _in_pool(self, work: Callable[[], _T]) -> _T:
        """Work in a thread cannot be cancelled: see `finished`."""
        return await finished(asyncio.get_running_loop().run_in_executor(self._pool, work))


async def finished(work: Awaitable[_T]) -> _T:
    """The outcome of work that goes on when nobody waits for it: whoever cancels us waits for its end, so that nothing
    goes on behind the back of the `destroy` that follows."""
    job = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        await asyncio.wait({job})
        if not job.cancelled():
            job.exception()
        raise


def checked_id(sandbox_id: str) -> str:
    """Raises `InvalidError` for what cannot be a part of names and paths."""
    if _SANDBOX_ID.fullmatch(sandbox_id) is None:
        raise InvalidError(f"{sandbox_id!r} is no sandbox id")
    return sandbox_id


def _processors() -> int:
    return len(os.sched_getaffinity(0))
