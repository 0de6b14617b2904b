"""Child processes of the server: spawned ones, and orphans that a runtime or conmon leaves to us, the subreaper.

Each is watched by a pidfd in the event loop and reaped at once: a zombie whose parent is outside a sandbox would hold
up the end of that sandbox's pid namespace. Children of others (`subprocess`, asyncio) are never touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Final

from . import pids

UNKNOWN_EXIT: Final = 255
"""Reported when someone else reaped the process, so that its exit code is lost."""
_SETTLE_SECONDS: Final = 5.0
_RUNTIME_NAME: Final = re.compile(r"(conmon|crun|runsc|runc(:.*)?|exe|[0-9]+)$")
"""A program run from a memfd is named after its descriptor's number, and `exe` when it runs itself again."""


class Child:
    """One watched process. `exited` resolves to its exit code, 128+n for signal n."""

    def __init__(self, pid: int, descriptor: int, exited: asyncio.Future[int]) -> None:
        self.pid: Final = pid
        self.exited: Final = exited
        self._descriptor: int | None = descriptor

    @property
    def descriptor(self) -> int | None:
        """The pidfd; None once the process has been reaped."""
        return self._descriptor

    async def wait(self) -> int:
        """Any number of callers; cancelling one does not disturb the others."""
        return await asyncio.shield(self.exited)

    def signal(self, number: int) -> None:
        """Harmless when the process has ended."""
        if self._descriptor is not None:
            pids.send_signal(self._descriptor, number)

    def release(self) -> None:
        """Frees the pidfd."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Children:
    """All watched children. Use from the event loop's thread only."""

    def __init__(self, is_ours: Callable[[int], bool]) -> None:
        """`is_ours`: whether a process is, or was when it ended, in a sandbox of this server."""
        self._is_ours = is_ours
        self._again: asyncio.TimerHandle | None = None
        self._watched: dict[int, tuple[Child, subprocess.Popen[bytes] | None]] = {}
        self._orphans: dict[int, float] = {}
        """Ended children of no one, and when they were first seen (monotonic)."""

    def spawn(
        self,
        argv: Sequence[str],
        *,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        stdout: int | IO[bytes] = subprocess.DEVNULL,
        stderr: int | IO[bytes] = subprocess.DEVNULL,
        pass_fds: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
        new_session: bool = False,
    ) -> Child:
        """Starts a program with no descriptors but those named. Raises `OSError` if it cannot be started."""
        process = subprocess.Popen(
            argv,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=tuple(pass_fds),
            env=env,
            start_new_session=new_session,
            cwd="/",
        )
        return self._watch(process.pid, process)

    def watch(self, pid: int) -> Child:
        """Watches an orphan. Raises `ProcessLookupError` if there is no such process."""
        return self._watch(pid, None)

    def reap_orphans(self, going_away: Callable[[int], bool]) -> None:
        """Reaps ended orphans that no one watches: what a killed runtime or monitor left behind.

        Only what is surely not another part's child: processes of the sandbox that is going away, at once; and after
        a while those of any sandbox, runtimes and monitors. A while, because a command that has just been started and
        has ended already is about to be watched. What is still too young is looked at again later.
        """
        watched = {child.pid for child, _ in self._watched.values()}
        now = time.monotonic()
        seen: dict[int, float] = {}
        for pid in _ended_children() - watched:
            stat = pids.read_stat(pid)
            if stat is None or not (_RUNTIME_NAME.match(stat.name) or self._is_ours(pid)):
                continue
            first_seen = self._orphans.get(pid, now)
            if now - first_seen > _SETTLE_SECONDS or going_away(pid):
                with contextlib.suppress(ChildProcessError):
                    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
            else:
                seen[pid] = first_seen
        self._orphans = seen
        if seen:
            self.reap_orphans_later()

    def reap_orphans_later(self) -> None:
        """Looks for orphans in a while; one look for any number of calls, since it walks all of /proc."""
        if self._again is None:
            self._again = asyncio.get_running_loop().call_later(_SETTLE_SECONDS + 0.1, self._look_again)

    def _look_again(self) -> None:
        self._again = None
        self.reap_orphans(lambda _: False)

    def _watch(self, pid: int, process: subprocess.Popen[bytes] | None) -> Child:
        loop = asyncio.get_running_loop()
        descriptor = os.pidfd_open(pid)
        child = Child(pid, descriptor, loop.create_future())
        self._watched[descriptor] = (child, process)
        loop.add_reader(descriptor, self._ended, descriptor)
        return child

    def _ended(self, descriptor: int) -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        child, process = self._watched.pop(descriptor)
        code = pids.reap(descriptor)
        code = UNKNOWN_EXIT if code is None else code
        if process is not None:
            process.returncode = code
        child.release()
        if not child.exited.done():
            child.exited.set_result(code)

    def close(self) -> None:
        """Stops watching. What still runs goes on and passes to init when this process ends."""
        if self._again is not None:
            self._again.cancel()
        loop = asyncio.get_running_loop()
        for descriptor, (child, process) in self._watched.items():
            loop.remove_reader(descriptor)
            child.release()
            child.exited.cancel()
            if process is not None and process.poll() is None:
                process.returncode = UNKNOWN_EXIT  # it is not waited for, on purpose
        self._watched.clear()


def _ended_children() -> set[int]:
    ended = set()
    for name in os.listdir("/proc"):
        if name.isdecimal():
            stat = pids.read_stat(int(name))
            if stat is not None and stat.state == "Z" and stat.parent == os.getpid():
                ended.add(int(name))
    return ended
