"""One created sandbox, as the core holds it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from hiver_backends.linux import bundle, logs, session
from hiver_backends.linux.conmon import Conmon, Monitor
from hiver_backends.linux.execs import Execs
from hiver_backends.linux.runtime import RuntimeCalls
from hiver_backends.linux.terminal import EntryTerminal
from hiver_backends.linux.workload import ContainerWorkload, Process, Shared
from hiverd.contracts.isolation import (
    LogChunk,
    WorkloadExit,
    WorkloadSpec,
)

_LAST_OUTPUT_BYTES: Final = 4096


class Engine(Struct, frozen=True, kw_only=True):
    """What all workloads of one server share."""

    calls: RuntimeCalls
    conmon: Conmon
    execs: Execs
    shared: Shared


class Identity(Struct, frozen=True, kw_only=True):
    """The state document: which process is process 1 of the sandbox. No secrets."""

    version: int = 1
    pid: int
    start_ticks: int
    boot_id: str
    host_id: int | None


class Places(Struct, frozen=True, kw_only=True):
    """A sandbox's folders: `run` is gone after a reboot, `log` is on disk.

    `mount` has something mounted only while the sandbox is made. It is not below `run`, because a runtime looks up the
    root file system with the rights of the sandbox's root, who may not enter our private folders.
    """

    run: Path
    log: Path
    mount: Path

    @property
    def rootfs(self) -> Path:
        """Where the root file system is mounted on the host until the runtime has taken it over."""
        return self.mount / "rootfs"

    @property
    def main(self) -> Monitor:
        """The monitor of process 1."""
        return Monitor(folder=self.run, log=self.log / "output.log", exit_dir=self.log)

    @property
    def session(self) -> Monitor:
        """The monitor of an entrypoint with a terminal."""
        log = self.log / "tty"
        return Monitor(folder=self.run / "tty", log=log / "output.log", exit_dir=log)


class OciWorkload(ContainerWorkload):
    """A sandbox whose container we have made."""

    def __init__(self, spec: WorkloadSpec, identity: Identity, descriptor: int, places: Places, engine: Engine) -> None:
        """`descriptor` is a pidfd of process 1; this object owns it."""
        process = Process(pid=identity.pid, descriptor=descriptor, host_id=identity.host_id)
        super().__init__(spec, process, spec.sandbox_id, engine.execs, engine.shared)
        self._identity = identity
        self._places = places
        self._engine = engine
        self._exit: WorkloadExit | None = None
        if spec.tty and spec.argv:
            shared = engine.shared
            self._terminal = EntryTerminal(
                spec.sandbox_id, places.session, shared.inotify, shared.pool, self._has_ended
            )

    @property
    def state(self) -> dict[str, Any]:
        identity = self._identity
        return {name: getattr(identity, name) for name in identity.__struct_fields__}

    async def begin(self) -> None:
        await self._engine.calls.start(self.sandbox_id, self._places.run / "start.log")
        if self._terminal is not None and not self._places.session.folder.exists():
            await self._begin_session()

    async def _begin_session(self) -> None:
        spec = self._spec
        process = bundle.process(list(spec.argv), bundle.environment(spec), spec.cwd or "/", terminal=True)
        await session.begin(self._engine.conmon, self.sandbox_id, self._places.session, process)

    async def wait(self) -> WorkloadExit:
        await self._until_ended()
        if self._exit is None:
            code = await session.exit_code(self._places.main, self.sandbox_id, self._shared.inotify)
            if code == 1 and self._spec.argv and self._terminal is None:
                last, _ = await self._in_pool(lambda: logs.tail_bytes(self._places.main.log, _LAST_OUTPUT_BYTES))
                code = bundle.entry_exit_code(code, last)
            killed_for_memory = code == 128 + signal.SIGKILL and self._oom_kills > 0
            self._exit = WorkloadExit(exit_code=code, out_of_memory=killed_for_memory)
        return self._exit

    def entrypoint_output(self, position: str | None) -> AsyncIterator[LogChunk]:
        return logs.follow(self._places.main.log, position, self._shared.inotify, self._output_ended)

    async def stop(self, grace_seconds: float) -> None:
        await self.resume()  # what is paused does not end
        if grace_seconds > 0 and not self._has_ended():
            await self._ask_to_end(grace_seconds)
        await self._kill()

    async def _ask_to_end(self, grace_seconds: float) -> None:
        waiting: Awaitable[object]
        if self._terminal is not None:
            # SIGHUP as well, as when a terminal closes: interactive shells ignore the former.
            if not self._signal_inside(self._terminal.entrypoint_pid(), signal.SIGTERM, signal.SIGHUP):
                return
            waiting = self._terminal.wait()
        elif self._spec.argv:
            self._signal(signal.SIGTERM)
            waiting = self._until_ended()
        else:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_seconds):
                await waiting

    def _output_ended(self) -> bool:
        monitor = self._places.main
        if monitor.exit_code(self.sandbox_id) is not None:
            return True
        return self._has_ended() and not monitor.is_running(self.sandbox_id)
