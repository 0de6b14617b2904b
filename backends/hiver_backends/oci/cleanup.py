"""Removing all that bears a sandbox's id, from whatever state a dead server left it in. Blocking calls."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Final

from hiver_backends.linux import pids
from hiver_backends.linux.cgroups import Cgroups
from hiver_backends.linux.rootfs import mounts_below, unmount_below
from hiver_backends.linux.runtime import ENVIRONMENT, Runtime
from hiver_backends.linux.trial import PREFIX
from hiverd.contracts.errors import BackendError

from .workload import Places

_ROUNDS: Final = 3
"""A runtime that is just starting another program has no arguments to know it by, and makes groups anew until the next
round finds it."""
_TIMEOUT_SECONDS: Final = 20.0
_MONITOR_SECONDS: Final = 0.5
CREATED_MARK: Final = "created"
"""File in a sandbox's run folder once `create` is through: from then on its pid files name all its monitors."""


class Cleaner:
    """`folders` hold one folder per sandbox each, `state_dir` the runtime's own."""

    def __init__(self, folders: Places, state_dir: Path, cgroups: Cgroups, runtime: Runtime) -> None:
        self._folders = folders
        self._state_dir = state_dir
        self._cgroups = cgroups
        self._runtime = runtime

    def places(self, sandbox_id: str) -> Places:
        """Where a sandbox's files are."""
        parents = self._folders
        return Places(run=parents.run / sandbox_id, log=parents.log / sandbox_id, mount=parents.mount / sandbox_id)

    def destroy(self, sandbox_id: str) -> bool:
        """Kills and removes. Raises `BackendError` naming what is left, if anything is.

        Returns whether there may be ended orphans to reap, as of a sandbox that was only half made.
        """
        places = self.places(sandbox_id)
        half_made = not (places.run / CREATED_MARK).exists()
        for _ in range(_ROUNDS):
            try:
                self._remove(sandbox_id, places, half_made=half_made)
            except OSError as error:
                raise BackendError(f"sandbox {sandbox_id} cannot be removed: {error}") from error
            left = self._left(sandbox_id, places)
            if not left:
                return half_made
        raise BackendError(f"of sandbox {sandbox_id} there is left: {', '.join(left)}")

    def _remove(self, sandbox_id: str, places: Places, *, half_made: bool) -> None:
        if half_made:
            # A monitor or a runtime that goes on would make more of what is being removed.
            self._kill_monitors(sandbox_id, places)
        if self._runtime.kind == "runsc":
            self._delete_by_runtime(sandbox_id)
        self._cgroups.remove(sandbox_id, _TIMEOUT_SECONDS)
        self._let_monitors_end(sandbox_id, places)
        self._kill_monitors(sandbox_id, places)
        unmount_below(places.mount)
        _remove_mount_folder(places.mount)
        for folder in (self._state_dir / sandbox_id, places.run, places.log):
            _remove_folder(folder)

    def owned(self) -> frozenset[str]:
        """Ids of all sandboxes of which anything is left."""
        ids = self._cgroups.owned() | set(self._monitors(None).values())
        for folder in (self._folders.run, self._folders.log, self._folders.mount, self._state_dir):
            with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
                ids.update(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        return frozenset(name for name in ids if not name.startswith(PREFIX))

    def _left(self, sandbox_id: str, places: Places) -> list[str]:
        left = [f"mount {target}" for target in mounts_below(places.mount)]
        left += [f"control group {folder}" for folder in self._cgroups.folders(sandbox_id)]
        folders = (self._state_dir / sandbox_id, places.run, places.log, places.mount)
        return left + [f"folder {folder}" for folder in folders if folder.exists()]

    def _kill_monitors(self, sandbox_id: str, places: Places) -> None:
        """Ends conmon, and runtimes that a dead server left in the middle of something, before what they watch."""
        deadline_monotonic = time.monotonic() + _TIMEOUT_SECONDS
        while victims := self._find_monitors(sandbox_id, places):
            for pid in victims:
                self._kill_monitor(pid, sandbox_id)
            if time.monotonic() > deadline_monotonic:
                raise TimeoutError(f"monitor processes do not end: {victims}")
            time.sleep(0.001)

    def _let_monitors_end(self, sandbox_id: str, places: Places) -> None:
        """A monitor reaps its process and ends at once. Killed first, it would leave a zombie to us."""
        deadline_monotonic = time.monotonic() + _MONITOR_SECONDS
        while self._find_monitors(sandbox_id, places) and time.monotonic() < deadline_monotonic:
            time.sleep(0.001)

    def _find_monitors(self, sandbox_id: str, places: Places) -> list[int]:
        if not (places.run / CREATED_MARK).exists():
            return list(self._monitors(sandbox_id))
        found = [monitor.running_conmon(sandbox_id) for monitor in (places.main, places.session)]
        return [pid for pid in found if pid is not None]

    def _kill_monitor(self, pid: int, sandbox_id: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            try:
                if self._monitored(pid) == sandbox_id:
                    pids.send_signal(descriptor, signal.SIGKILL)
            finally:
                os.close(descriptor)

    def _monitors(self, sandbox_id: str | None) -> dict[int, str]:
        """Pids of our conmon and runtime processes -> the sandbox they work for; all sandboxes if None."""
        found = {}
        for name in os.listdir("/proc"):
            if name.isdecimal():
                owner = self._monitored(int(name))
                if owner is not None and sandbox_id in {None, owner}:
                    found[int(name)] = owner
        return found

    def _monitored(self, pid: int) -> str | None:
        """The sandbox for which a process works: our state folder is in its arguments, so it is ours."""
        try:
            arguments = Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")
        except OSError:
            return None
        if os.fsencode(self._state_dir) not in arguments or pid == os.getpid():
            return None
        if b"--cid" in arguments:
            return os.fsdecode(arguments[arguments.index(b"--cid") + 1])
        return os.fsdecode(arguments[-2]) if len(arguments) > 2 else None

    def _delete_by_runtime(self, sandbox_id: str) -> None:
        """gVisor has processes outside the sandbox's groups that only it knows."""
        arguments = self._runtime.global_arguments(self._state_dir)
        argv = [self._runtime.path, *arguments, "delete", "--force", sandbox_id]
        subprocess.run(
            argv, env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_SECONDS, check=False
        )


def _remove_mount_folder(folder: Path) -> None:
    """Only ever empty folders: if something were still mounted, removing what is in it would be a disaster."""
    for path in (folder / "rootfs", folder / "lower", folder):
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()


def _remove_folder(folder: Path) -> None:
    """A killed monitor may still be writing its last file, so a folder that fills again is emptied again."""
    for attempt in range(20):
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            if not folder.exists():
                return
        except OSError:
            if attempt == 19:
                raise
        else:
            return
        time.sleep(0.005)
