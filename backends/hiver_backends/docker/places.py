"""A sandbox's folders on this host, and removing what is left in them. Blocking calls."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Final

from msgspec import Struct

from hiver_backends.linux import pids
from hiver_backends.linux.conmon import Monitor
from hiver_backends.linux.rootfs import mounts_below, unmount_below
from hiverd.contracts.errors import BackendError

_MONITOR_SECONDS: Final = 1.0
_TIMEOUT_SECONDS: Final = 20.0
_ROUNDS: Final = 20


class Places(Struct, frozen=True, kw_only=True):
    """`run` is gone after a reboot, `log` is on disk; `mount` has something mounted only while the sandbox is made."""

    run: Path
    log: Path
    mount: Path

    def of(self, sandbox_id: str) -> Places:
        """One sandbox's folders below these."""
        return Places(run=self.run / sandbox_id, log=self.log / sandbox_id, mount=self.mount / sandbox_id)

    @property
    def rootfs(self) -> Path:
        """Where the root file system is mounted on the host until the container has it."""
        return self.mount / "rootfs"

    @property
    def entrypoint(self) -> Monitor:
        """The monitor of the entrypoint."""
        return Monitor(folder=self.run / "entry", log=self.log / "output.log", exit_dir=self.log)

    def owned(self) -> set[str]:
        """Names of the folders below these: ids of sandboxes of which something is left."""
        names: set[str] = set()
        for folder in (self.run, self.log, self.mount):
            with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
                names.update(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        return names

    def make(self) -> None:
        """Raises `FileExistsError` if something of the sandbox is there already."""
        self.run.mkdir(mode=0o700)
        self.log.mkdir(mode=0o700, exist_ok=True)
        self.mount.mkdir(mode=0o700)

    def remove(self) -> None:
        """Once the container is gone. Raises `BackendError` naming what is left."""
        try:
            self._end_monitors()
            unmount_below(self.mount)
            # Only ever empty folders: if something were still mounted, removing what is in it would be a disaster.
            for path in (self.rootfs, self.mount / "lower", self.mount):
                with contextlib.suppress(FileNotFoundError):
                    path.rmdir()
            for folder in (self.run, self.log):
                _remove_folder(folder)
        except OSError as error:
            raise BackendError(f"what a sandbox leaves cannot be removed: {error}") from error
        left = mounts_below(self.mount) + [str(path) for path in (self.run, self.log, self.mount) if path.exists()]
        if left:
            raise BackendError(f"of a sandbox there is left: {', '.join(left)}")

    def _end_monitors(self) -> None:
        """A monitor ends with its process, having recorded its exit; one that does not is killed."""
        patient_until = time.monotonic() + _MONITOR_SECONDS
        deadline_monotonic = time.monotonic() + _TIMEOUT_SECONDS
        while left := self._monitors():
            if time.monotonic() > patient_until:
                for pid in left:
                    self._kill(pid)
            if time.monotonic() > deadline_monotonic:
                raise TimeoutError(f"monitor processes do not end: {left}")
            time.sleep(0.002)

    def _monitors(self) -> list[int]:
        """conmon, and runtimes that a dead server left in the middle of something: our folder is in their arguments."""
        if not self.entrypoint.folder.exists():
            return []
        known = _read_pid(self.entrypoint.conmon_pid_file)
        if known is not None:
            return [known] if self._is_ours(known) else []
        return [int(name) for name in os.listdir("/proc") if name.isdecimal() and self._is_ours(int(name))]

    def _is_ours(self, pid: int) -> bool:
        try:
            arguments = Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        folder = os.fsencode(self.entrypoint.folder)
        return pid != os.getpid() and any(word == folder or word.startswith(folder + b"/") for word in arguments)

    def _kill(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            try:
                if self._is_ours(pid):
                    pids.send_signal(descriptor, signal.SIGKILL)
            finally:
                os.close(descriptor)


def _read_pid(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _remove_folder(folder: Path) -> None:
    """A killed monitor may still be writing its last file, so a folder that fills again is emptied again."""
    for attempt in range(_ROUNDS):
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            if not folder.exists():
                return
        except OSError:
            if attempt == _ROUNDS - 1:
                raise
        else:
            return
        time.sleep(0.005)
