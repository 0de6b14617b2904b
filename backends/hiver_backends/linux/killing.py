"""Killing one command with all that descends from it, and nothing else. Blocking calls."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from . import pids
from .cgroups import Cgroups
from .children import Child

_TIMEOUT_SECONDS: Final = 10.0


class ProcessTree:
    """The processes of one command: its descendants, its session, and whoever holds its pipes.

    Only members of the sandbox's control group are ever looked at, so nothing outside can be hit.
    """

    def __init__(self, cgroups: Cgroups, sandbox_id: str, child: Child) -> None:
        self._cgroups = cgroups
        self._sandbox_id = sandbox_id
        self._pid = child.pid
        stat = pids.read_stat(child.pid)
        self._start_ticks = stat.start_ticks if stat is not None else None

    def kill(self, pipes: Sequence[int]) -> None:
        """SIGKILL until none is left. `pipes` are our ends of the command's output. Raises `TimeoutError`."""
        names = {os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in pipes}
        deadline_monotonic = time.monotonic() + _TIMEOUT_SECONDS
        delay_seconds = 0.001
        while victims := self._find(names):
            for pid, start_ticks in victims.items():
                self._kill_one(pid, start_ticks)
            if time.monotonic() > deadline_monotonic:
                raise TimeoutError(f"{len(victims)} processes of a command do not end")
            time.sleep(delay_seconds)
            delay_seconds = min(2 * delay_seconds, 0.05)

    def _find(self, pipe_names: set[str]) -> dict[int, int]:
        stats = {}
        for pid in self._cgroups.members(self._sandbox_id):
            stat = pids.read_stat(pid)
            if stat is not None and stat.state not in "ZX":
                stats[pid] = stat
        own = stats.get(self._pid)
        reused = own is not None and own.start_ticks != self._start_ticks
        found = set() if reused else pids.descendants(self._pid, stats)
        if pipe_names:
            found |= {pid for pid in stats.keys() - found if _holds(pid, pipe_names)}
        return {pid: stats[pid].start_ticks for pid in found}

    def _kill_one(self, pid: int, start_ticks: int) -> None:
        descriptor = pids.open_verified(pid, start_ticks)
        if descriptor is None:
            return
        try:
            if self._cgroups.contains(self._sandbox_id, pid):
                pids.send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)


def _holds(pid: int, names: set[str]) -> bool:
    folder = Path("/proc", str(pid), "fd")
    with contextlib.suppress(OSError):
        for entry in os.listdir(folder):
            with contextlib.suppress(OSError):
                if os.readlink(folder / entry) in names:
                    return True
    return False
