"""One created sandbox, as the core holds it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from hiver_backends.linux import bundle, logs, session
from hiver_backends.linux.children import UNKNOWN_EXIT
from hiver_backends.linux.conmon import Conmon
from hiver_backends.linux.execs import Execs
from hiver_backends.linux.terminal import EntryTerminal
from hiver_backends.linux.workload import ContainerWorkload, Process, Shared
from hiverd.contracts.isolation import ExecSpec, LogChunk, WorkloadExit, WorkloadSpec

from .places import Places

_LOOK_AGAIN_SECONDS: Final = 5.0
_PIPES_SECONDS: Final = 0.001
_KILLED: Final = 128 + signal.SIGKILL


class Identity(Struct, frozen=True, kw_only=True):
    """The state document: the container, its process 1, and where the runtime below Docker knows it. No secrets."""

    version: int = 1
    container_id: str
    pid: int
    start_ticks: int
    boot_id: str
    runtime: str
    state_dir: str
    host_id: int | None = None
    """Host id of the sandbox's root where the Engine maps user ids."""
    apparmor: str = ""
    selinux: str = ""


class Tools(Struct, frozen=True, kw_only=True):
    """What runs programs in the container."""

    conmon: Conmon
    execs: Execs
    shared: Shared


class DockerWorkload(ContainerWorkload):
    """Once created, a sandbox needs the Engine only to be removed.

    Process 1 waits and reaps; the entrypoint runs beside it, and its end without a terminal is the sandbox's.
    """

    def __init__(self, spec: WorkloadSpec, identity: Identity, descriptor: int, places: Places, tools: Tools) -> None:
        """`descriptor` is a pidfd of process 1; this object owns it."""
        process = Process(pid=identity.pid, descriptor=descriptor, host_id=identity.host_id)
        super().__init__(spec, process, identity.container_id, tools.execs, tools.shared)
        self._identity = identity
        self._places = places
        self._tools = tools
        self._exit: WorkloadExit | None = None
        if spec.tty and spec.argv:
            shared = tools.shared
            self._terminal = EntryTerminal(
                identity.container_id, places.entrypoint, shared.inotify, shared.pool, self._has_ended
            )

    @property
    def state(self) -> dict[str, Any]:
        identity = self._identity
        return {name: getattr(identity, name) for name in identity.__struct_fields__}

    async def begin(self) -> None:
        spec = self._spec
        if not spec.argv or self._places.entrypoint.folder.exists():
            return
        cwd = spec.cwd or "/"
        terminal = self._terminal is not None
        process = bundle.process(list(spec.argv), bundle.environment(spec), cwd, terminal=terminal)
        giving = asyncio.create_task(self._give_pipes(), name=f"pipes of {self.sandbox_id}") if self._host_id else None
        try:
            await session.begin(
                self._tools.conmon, self._container_id, self._places.entrypoint, self._confined(process)
            )
        finally:
            if giving is not None:
                giving.cancel()

    async def _give_pipes(self) -> None:
        """Makes the entrypoint's output the property of the sandbox's root, while the runtime still gets ready: so that
        it can open /dev/stdout and /dev/stderr. Without user-id mapping it is so from the beginning."""
        owner = self.root_ids
        monitor = self._places.entrypoint
        while True:
            pid = monitor.running_conmon(self._container_id)
            if pid is not None:
                _give(Path("/proc", str(pid), "fd"), owner)
            await asyncio.sleep(_PIPES_SECONDS)

    def _exec_document(self, spec: ExecSpec) -> dict[str, Any]:
        return self._confined(super()._exec_document(spec))

    def _confined(self, process: dict[str, Any]) -> dict[str, Any]:
        """Under the same security modules' labels as Docker's own commands."""
        if self._identity.apparmor:
            process["apparmorProfile"] = self._identity.apparmor
        if self._identity.selinux:
            process["selinuxLabel"] = self._identity.selinux
        return process

    async def wait(self) -> WorkloadExit:
        if self._exit is None:
            await self._until_over()
            code = await self._exit_code()
            self._exit = WorkloadExit(exit_code=code, out_of_memory=code == _KILLED and self._oom_kills > 0)
        return self._exit

    async def _until_over(self) -> None:
        """Until process 1 has ended; the end of an entrypoint without a terminal is made its end."""
        if not self._ends_with_entrypoint:
            await self._until_ended()
            return
        monitor = self._places.entrypoint
        ended = asyncio.ensure_future(self._until_ended())
        try:
            watch = self._shared.inotify.watch(monitor.exit_dir)
        except FileNotFoundError:
            await ended
            return
        try:
            # Each piece of output wakes us as well, so this look has to be cheap; the thorough one is for a monitor
            # that was killed, as then nothing changes in the folder.
            while not ended.done() and monitor.exit_code(self._container_id) is None:
                changed = asyncio.ensure_future(watch.changed.wait())
                done, _ = await asyncio.wait(
                    {ended, changed}, timeout=_LOOK_AGAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                changed.cancel()
                watch.changed.clear()
                if not done and self._monitor_died():
                    break
        finally:
            watch.close()
            ended.cancel()
        if not self._has_ended():
            # Read now, as the control group goes with the container.
            self._oom_kills = self._shared.cgroups.oom_kills(self.sandbox_id)
            await self._kill()

    @property
    def _ends_with_entrypoint(self) -> bool:
        return bool(self._spec.argv) and self._terminal is None

    def _monitor_died(self) -> bool:
        monitor = self._places.entrypoint
        return monitor.conmon_pid_file.exists() and not monitor.is_running(self._container_id)

    async def _exit_code(self) -> int:
        if not self._ends_with_entrypoint:
            return _KILLED
        code = await session.exit_code(self._places.entrypoint, self._container_id, self._shared.inotify)
        return _KILLED if code == UNKNOWN_EXIT else code

    def entrypoint_output(self, position: str | None) -> AsyncIterator[LogChunk]:
        return logs.follow(self._places.entrypoint.log, position, self._shared.inotify, self._output_ended)

    def _output_ended(self) -> bool:
        monitor = self._places.entrypoint
        if monitor.exit_code(self._container_id) is not None:
            return True
        return self._has_ended() and not monitor.is_running(self._container_id)

    async def stop(self, grace_seconds: float) -> None:
        await self.resume()  # what is paused does not end
        if grace_seconds > 0 and not self._has_ended():
            await self._ask_to_end(grace_seconds)
        await self._kill()

    async def _ask_to_end(self, grace_seconds: float) -> None:
        # SIGHUP as well, as when a terminal closes: interactive shells ignore the former.
        signals = (signal.SIGTERM, signal.SIGHUP) if self._terminal is not None else (signal.SIGTERM,)
        if not self._signal_inside(self._entrypoint_pid(), *signals):
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_seconds):
                await (self._terminal.wait() if self._terminal is not None else self.wait())

    def _entrypoint_pid(self) -> int | None:
        """Not verified: whoever signals it looks whether it is in the sandbox."""
        try:
            return int(self._places.entrypoint.pid_file.read_text())
        except (OSError, ValueError):
            return None


def _give(descriptors: Path, owner: tuple[int, int]) -> None:
    with contextlib.suppress(OSError):
        for name in os.listdir(descriptors):
            path = descriptors / name
            with contextlib.suppress(OSError):
                if os.readlink(path).startswith("pipe:"):
                    os.chown(path, *owner)
