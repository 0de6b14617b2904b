"""One created sandbox, as the core holds it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from msgspec import Struct

from hiver_backends.linux import bundle, livemounts, logs, network, pids
from hiver_backends.linux.cgroups import Cgroups
from hiver_backends.linux.children import UNKNOWN_EXIT, Child, Children
from hiver_backends.linux.conmon import Conmon, Monitor
from hiver_backends.linux.execs import ExecRequest, Execs
from hiver_backends.linux.inotify import Inotify
from hiver_backends.linux.killing import ProcessTree
from hiver_backends.linux.rootfs import RootFs
from hiver_backends.linux.runtime import RuntimeCalls, start_failure
from hiver_backends.linux.terminal import EntryTerminal, record_failure
from hiverd.contracts.errors import BackendError, SandboxGoneError
from hiverd.contracts.isolation import (
    ExecProcess,
    ExecSpec,
    LogChunk,
    Mount,
    Terminal,
    Usage,
    Workload,
    WorkloadExit,
    WorkloadSpec,
)

_EXIT_FILE_SECONDS: Final = 10.0
_ORPHANS_SECONDS: Final = 0.1
_LAST_OUTPUT_BYTES: Final = 4096
_T = TypeVar("_T")


class Engine(Struct, frozen=True, kw_only=True):
    """What all workloads of one server share."""

    calls: RuntimeCalls
    conmon: Conmon
    execs: Execs
    children: Children
    cgroups: Cgroups
    inotify: Inotify
    rootfs: RootFs
    pool: Executor


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


class OciWorkload(Workload):
    """`descriptor` is a pidfd of process 1; this object owns it."""

    def __init__(self, spec: WorkloadSpec, identity: Identity, descriptor: int, places: Places, engine: Engine) -> None:
        self.sandbox_id = spec.sandbox_id
        self._spec = spec
        self._identity = identity
        self._descriptor: int | None = descriptor
        self._places = places
        self._engine = engine
        self._mounts = {mount.target: mount.source for mount in spec.mounts}
        self._ended: asyncio.Future[bool] | None = None
        self._exit: WorkloadExit | None = None
        self._terminal: EntryTerminal | None = None
        if spec.tty and spec.argv:
            self._terminal = EntryTerminal(
                spec.sandbox_id, places.session, engine.inotify, engine.pool, self._has_ended
            )

    @property
    def state(self) -> dict[str, Any]:
        identity = self._identity
        return {name: getattr(identity, name) for name in identity.__struct_fields__}

    @property
    def network_namespace(self) -> str | None:
        return f"/proc/{self._identity.pid}/ns/net"

    @property
    def root_ids(self) -> tuple[int, int]:
        first = self._identity.host_id or 0
        return (first, first)

    def open_root(self) -> int:
        try:
            descriptor = os.open(f"/proc/{self._identity.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise SandboxGoneError(f"sandbox {self.sandbox_id} has ended") from error
        # Only now is it sure that the pid was still ours when the path was followed.
        if self._has_ended():
            os.close(descriptor)
            raise SandboxGoneError(f"sandbox {self.sandbox_id} has ended")
        return descriptor

    async def begin(self) -> None:
        await self._engine.calls.start(self.sandbox_id, self._places.run / "start.log")
        if self._terminal is not None and not self._places.session.folder.exists():
            await self._begin_session()

    async def _begin_session(self) -> None:
        monitor = self._places.session
        for folder in (monitor.folder, monitor.exit_dir):
            folder.mkdir(mode=0o700, exist_ok=True)
        spec = self._spec
        cwd = spec.cwd or "/"
        process = bundle.process(list(spec.argv), bundle.environment(spec), cwd, terminal=True)
        document = monitor.folder / "process.json"
        descriptor = os.open(document, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(process, file)
        try:
            await self._engine.conmon.exec_terminal(self.sandbox_id, monitor, document)
        except BackendError as error:
            verdict = start_failure(error.message, spec.argv, cwd)
            if verdict is None:
                raise
            record_failure(monitor, self.sandbox_id, *verdict)
        finally:
            document.unlink(missing_ok=True)

    async def wait(self) -> WorkloadExit:
        await self._until_ended()
        if self._exit is None:
            code = await self._exit_code()
            if code == 1 and self._spec.argv and self._terminal is None:
                last, _ = await self._in_pool(lambda: logs.tail_bytes(self._places.main.log, _LAST_OUTPUT_BYTES))
                code = bundle.entry_exit_code(code, last)
            killed_for_memory = code == 128 + signal.SIGKILL and self._oom_kills > 0
            self._exit = WorkloadExit(exit_code=code, out_of_memory=killed_for_memory)
        return self._exit

    async def exec(self, spec: ExecSpec) -> ExecProcess:
        if self._has_ended():
            raise SandboxGoneError(f"sandbox {self.sandbox_id} has ended")
        request = ExecRequest(
            sandbox_id=self.sandbox_id,
            process=bundle.exec_process(spec, self._spec),
            owner=self.root_ids,
            stdin=spec.stdin,
        )
        try:
            return await self._engine.execs.start(request, self._process_tree)
        except BackendError as error:
            if self._has_ended():
                raise SandboxGoneError(f"sandbox {self.sandbox_id} has ended") from error
            raise

    def _process_tree(self, sandbox_id: str, child: Child) -> ProcessTree:
        return ProcessTree(self._engine.cgroups, sandbox_id, child)

    def entrypoint_output(self, position: str | None) -> AsyncIterator[LogChunk]:
        return logs.follow(self._places.main.log, position, self._engine.inotify, self._output_ended)

    def terminal(self) -> Terminal | None:
        return self._terminal

    async def usage(self) -> Usage:
        try:
            return await self._in_pool(lambda: self._engine.cgroups.usage(self.sandbox_id))
        except (OSError, KeyError, ValueError) as error:
            if self._has_ended():
                raise SandboxGoneError(f"sandbox {self.sandbox_id} has ended") from error
            raise BackendError(f"the usage of sandbox {self.sandbox_id} cannot be read") from error

    async def listening_ports(self) -> frozenset[int]:
        try:
            return await self._in_pool(lambda: network.listening_ports(self._identity.pid))
        except OSError as error:
            raise SandboxGoneError(f"sandbox {self.sandbox_id} has ended") from error

    async def add_mount(self, mount: Mount) -> None:
        engine, identity = self._engine, self._identity
        await self._in_pool(
            lambda: livemounts.attach_live(engine.rootfs, identity.pid, self.open_root, mount, identity.host_id)
        )
        self._mounts[mount.target] = mount.source

    async def remove_mount(self, target: str) -> None:
        place = (await self._find({target: self._mounts.get(target, "")})).get(target)
        if place is not None:
            await self._in_pool(lambda: self._take_away(place))
        self._mounts.pop(target, None)

    def _take_away(self, place: str) -> None:
        try:
            livemounts.detach_live(self._identity.pid, self.open_root, place)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # The kernel locks what was there when the user namespace was made (mount_namespaces(7)), for us as well.
            # An empty folder over it hides it for good: inside, nobody may take that away.
            empty = self._spec.volume / "removed" / secrets.token_hex(4)
            empty.mkdir(mode=0o755, parents=True)
            cover = Mount(target=place, source=str(empty))
            engine, identity = self._engine, self._identity
            livemounts.attach_live(engine.rootfs, identity.pid, self.open_root, cover, identity.host_id)

    async def mounted_targets(self) -> frozenset[str]:
        return frozenset(await self._find(dict(self._mounts)))

    async def _find(self, targets: dict[str, str]) -> dict[str, str]:
        return await self._in_pool(lambda: livemounts.find(self._identity.pid, self.open_root, targets))

    async def stop(self, grace_seconds: float) -> None:
        if grace_seconds > 0 and not self._has_ended():
            await self._ask_to_end(grace_seconds)
        self._signal(signal.SIGKILL)
        engine = self._engine
        while not await self._ends_within(_ORPHANS_SECONDS):
            # An unreaped orphan of ours inside holds up the end of its pid namespace.
            engine.children.reap_orphans(partial(engine.cgroups.contains, self.sandbox_id))
        if self._terminal is not None:
            self._terminal.close()

    async def _ends_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._until_ended()
        except TimeoutError:
            return False
        return True

    async def _ask_to_end(self, grace_seconds: float) -> None:
        waiting: Awaitable[object]
        if self._terminal is not None:
            if not self._hang_up(self._terminal.entrypoint_pid()):
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

    def _hang_up(self, pid: int | None) -> bool:
        """SIGTERM, and SIGHUP as when a terminal closes: interactive shells ignore the former."""
        if pid is None:
            return False
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        try:
            if not self._engine.cgroups.contains(self.sandbox_id, pid):
                return False
            pids.send_signal(descriptor, signal.SIGTERM)
            pids.send_signal(descriptor, signal.SIGHUP)
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

    _oom_kills = 0

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
        self._oom_kills = self._engine.cgroups.oom_kills(self.sandbox_id)
        if not self._ended.done():
            self._ended.set_result(True)

    async def _exit_code(self) -> int:
        """conmon records it a moment after the end."""
        monitor = self._places.main
        with contextlib.suppress(FileNotFoundError, TimeoutError):
            watch = self._engine.inotify.watch(monitor.exit_dir)
            try:
                async with asyncio.timeout(_EXIT_FILE_SECONDS):
                    while (code := monitor.exit_code(self.sandbox_id)) is None:
                        if not monitor.is_running(self.sandbox_id):
                            break
                        await watch.wait(1.0)
            finally:
                watch.close()
        code = monitor.exit_code(self.sandbox_id)
        return UNKNOWN_EXIT if code is None else code

    def _output_ended(self) -> bool:
        monitor = self._places.main
        if monitor.exit_code(self.sandbox_id) is not None:
            return True
        return self._has_ended() and not monitor.is_running(self.sandbox_id)

    async def _in_pool(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._engine.pool, work)
