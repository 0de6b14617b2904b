"""One governed mount as the server holds it: its process, its folder, its connection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from hiverd.contracts.errors import HiverError
from hiverd.files import linux
from hiverd.fuse import launch
from hiverd.fuse.control import Connection, MountServerLostError, error_of
from hiverd.fuse.frames import Attach, Begin, Change, Done, Finish, Question, Quit, Tell
from hiverd.sandboxes.mount_events import Listener
from hiverd.wire.model import AclRule

log = logging.getLogger(__name__)

BEGIN_SECONDS: Final = 60.0
"""For connecting to a service and mounting."""
ANSWER_SECONDS: Final = 15.0
_END_SECONDS: Final = 5.0


class MountServer:
    """Made by `start` or `adopt`. `folder` is its run folder, with the socket and the mount point."""

    def __init__(self, folder: Path, field: str, listener: Listener, on_lost: Callable[[MountServer], None]) -> None:
        """`field` names the entry in errors. `on_lost` is called if the process goes away unasked."""
        self.folder = folder
        self.ended = asyncio.Event()
        self.listener = listener
        self._field = field
        self._on_lost = on_lost
        self._connection: Connection | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._leaving = False
        self._rules: Sequence[AclRule] = ()

    @property
    def mountpoint(self) -> Path:
        return self.folder / launch.MOUNTPOINT

    async def start(self, begin: Begin) -> None:
        """A new process. Raises `HiverError` telling what is wrong; then nothing of it is left."""
        try:
            self._process = await asyncio.to_thread(self._spawn)
            await self._connect()
            await self._ask(begin, BEGIN_SECONDS)
            self._rules = begin.rules
        except BaseException:
            self._leaving = True
            await asyncio.shield(self._end())
            raise
        self._leaving = begin.mountpoint is None  # it ends by itself when nothing is pending

    async def adopt(self, rules: Sequence[AclRule], recording: bool) -> bool:
        """Takes over one that an earlier server started, and makes sure of its rules. False if there is none that
        answers."""
        if await asyncio.to_thread(launch.living_pid, self.folder) is None:
            return False
        try:
            await self._connect()
            await self._ask(Attach(number=self._number(), server_pid=os.getpid()), ANSWER_SECONDS)
            await self.change(rules, recording)
        except (OSError, HiverError) as error:
            log.warning("mount server %s cannot be taken over: %s", self.folder, error)
            await self.leave()
            return False
        return True

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.mountpoint.mkdir(mode=0o700, exist_ok=True)
        return launch.start(self.folder)

    async def _connect(self) -> None:
        path = self.folder / launch.SOCKET
        self._connection = await Connection.open(path, self.listener.take, self._lost)
        self.listener.connected(self._connection.confirm)

    def _lost(self) -> None:
        self.ended.set()
        if not self._leaving:
            self._on_lost(self)

    def _number(self) -> int:
        return 1 if self._connection is None else self._connection.next_number()

    async def _ask(self, question: Question, seconds: float) -> Done:
        if self._connection is None:
            raise MountServerLostError("the mount's process is not connected")
        done = await self._connection.ask(question, seconds)
        if done.failure is not None:
            raise error_of(done.failure, self._field)
        self.listener.pending = done.pending
        return done

    async def change(self, rules: Sequence[AclRule], recording: bool, entry: dict[str, Any] | None = None) -> None:
        """In force when this returns. Raises `HiverError`; then it is as before."""
        question = Change(number=self._number(), rules=list(rules), recording=recording, entry=entry)
        await self._ask(question, ANSWER_SECONDS if entry is None else BEGIN_SECONDS)
        self._rules = rules

    async def set_recording(self, recording: bool) -> None:
        """Whether accesses are to be told of. Raises `HiverError`."""
        await self.change(self._rules, recording)

    async def hand_over(self, seconds: float) -> None:
        """What happened until now has been told when this returns, or so many seconds have passed."""
        with contextlib.suppress(HiverError):
            await self._ask(Tell(number=self._number()), seconds)

    async def finish(self) -> None:
        """The mount goes; the process goes on uploading, and `ended` is set when it has ended."""
        self._leaving = True
        try:
            await self._ask(Finish(number=self._number()), ANSWER_SECONDS)
        except HiverError as error:
            log.warning("mount server %s does not finish: %s", self.folder, error)
            await self._end()

    async def quit(self) -> None:
        """The mount goes and the process ends; what is pending stays on disk."""
        self._leaving = True
        with contextlib.suppress(HiverError):
            await self._ask(Quit(number=self._number()), ANSWER_SECONDS)
        await self._end()

    def kill(self) -> None:
        """At once, with the mount: whoever waits for it gets an error. What is pending is on disk."""
        self._leaving = True
        pid = launch.living_pid(self.folder)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def leave(self) -> None:
        """The server goes; the mount stays."""
        self._leaving = True
        if self._connection is not None:
            await self._connection.close()

    async def discard(self) -> None:
        """Whatever state it is in: afterwards there is no process, no mount and no run folder."""
        self._leaving = True
        await self._end()

    async def _end(self) -> None:
        if self._connection is not None:
            await self._connection.close()
        self.ended.set()
        await asyncio.to_thread(remove_run_folder, self.folder, self._process)


def remove_run_folder(folder: Path, process: subprocess.Popen[bytes] | None = None) -> None:
    """Ends what serves there, unmounts, and removes the folder. Blocking; idempotent; raises `OSError` if it cannot."""
    _kill(folder, process)
    mountpoint = str(folder / launch.MOUNTPOINT)
    while True:
        try:
            linux.umount(mountpoint, linux.MNT_DETACH)
        except OSError:
            break
    # What is mounted must not be walked into: only these, then the folder itself.
    for name in (launch.SOCKET, launch.LOG, launch.PID):
        (folder / name).unlink(missing_ok=True)
    for empty in (folder / launch.MOUNTPOINT, folder, folder.parent):
        try:
            empty.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            if empty != folder.parent:
                raise


def _kill(folder: Path, process: subprocess.Popen[bytes] | None) -> None:
    pid = launch.living_pid(folder)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            try:
                if launch.living_pid(folder) == pid:
                    _end_process(descriptor)
            finally:
                os.close(descriptor)
    if process is not None:
        process.wait()


def _end_process(descriptor: int) -> None:
    """SIGTERM, which unmounts; then SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        signal.pidfd_send_signal(descriptor, number)
        if select.select([descriptor], [], [], _END_SECONDS)[0]:
            return
