"""Control groups of our sandboxes, in version 1, hybrid and version 2 layouts.

Every sandbox has the group `/hiver-<instance>/<sandbox id>` in each hierarchy. The runtime makes it; we read it, kill
what is in it, and remove it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from pathlib import Path
from typing import Final

from hiverd.contracts.isolation import Usage

from .freezer import Freezer, freezer_of

ROOT: Final = Path("/sys/fs/cgroup")
_PARENT_SHARES_V1: Final = 256
_PARENT_WEIGHT_V2: Final = 25
"""A quarter of the default: when processors are short, the server comes before all its sandboxes together."""


_FREEZE_TRY_SECONDS: Final = 0.1
_FREEZE_PAUSE_SECONDS: Final = 0.002


class Cgroups:
    """The layout of this host. All calls are quick and synchronous."""

    def __init__(self, instance: str, root: Path = ROOT) -> None:
        self.parent: Final = f"hiver-{instance}"
        self.unified: Final = (root / "cgroup.controllers").exists()
        """True on a pure version 2 host."""
        self.hierarchies: Final = (root,) if self.unified else _hierarchies(root)

    def path(self, sandbox_id: str) -> str:
        """`linux.cgroupsPath` of the OCI configuration."""
        return f"/{self.parent}/{sandbox_id}"

    def _place(self, sandbox_id: str) -> str:
        return self.path(sandbox_id).lstrip("/")

    def prepare(self) -> None:
        """Makes the parent groups and lowers their weight. A refusal costs only the priority, so it is no error."""
        for hierarchy in self.hierarchies:
            folder = hierarchy / self.parent
            with contextlib.suppress(OSError):
                folder.mkdir(exist_ok=True)
            for name, value in (("cpu.shares", _PARENT_SHARES_V1), ("cpu.weight", _PARENT_WEIGHT_V2)):
                with contextlib.suppress(OSError):
                    if (folder / name).exists():
                        (folder / name).write_text(str(value))

    def remove_parent(self) -> None:
        """Removes the parent groups if no sandbox is left in them."""
        for hierarchy in self.hierarchies:
            with contextlib.suppress(OSError):
                (hierarchy / self.parent).rmdir()

    def has_swap_limit(self) -> bool:
        """Whether memory plus swap can be limited; version 1 needs `swapaccount`."""
        if self.unified:
            return True
        return any((hierarchy / "memory.memsw.limit_in_bytes").exists() for hierarchy in self.hierarchies) or any(
            (hierarchy / self.parent / "memory.memsw.limit_in_bytes").exists() for hierarchy in self.hierarchies
        )

    def folders(self, sandbox_id: str) -> list[Path]:
        """The sandbox's groups that exist."""
        found = [hierarchy / self._place(sandbox_id) for hierarchy in self.hierarchies]
        return [folder for folder in found if folder.is_dir()]

    def owned(self) -> set[str]:
        """Ids of sandboxes with a group."""
        ids: set[str] = set()
        for hierarchy in self.hierarchies:
            with contextlib.suppress(OSError), os.scandir(hierarchy / self.parent) as entries:
                ids.update(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        return ids

    def processes(self, sandbox_id: str) -> set[int]:
        """Pids of all processes in the sandbox's groups, whichever hierarchy they are in."""
        pids: set[int] = set()
        for folder in self.folders(sandbox_id):
            pids |= _processes(folder)
        return pids

    def members(self, sandbox_id: str) -> set[int]:
        """Pids of the sandbox's processes, from one hierarchy: cheap, and complete once the runtime has started it."""
        for hierarchy in self.hierarchies:
            if not self.unified and hierarchy.name not in {"pids", "memory"}:
                continue
            folder = hierarchy / self._place(sandbox_id)
            if folder.is_dir():
                return _processes(folder)
        return set()

    def freeze(self, sandbox_id: str, timeout_seconds: float) -> bool:
        """Nothing in the group runs when this returns True. False: it could not be had in time, and it runs. Blocking.

        Raises `FileNotFoundError` where the kernel has no freezer.
        """
        places = self._freezers(sandbox_id)
        if not places:
            raise FileNotFoundError(errno.ENOENT, "no freezer")
        place = next((place for place in places if place.is_populated()), places[0])
        deadline_monotonic = time.monotonic() + timeout_seconds
        while not place.settles(_FREEZE_TRY_SECONDS):
            # Version 1 can get stuck on a process that is just being made; runc begins anew, too.
            place.thaw()
            if time.monotonic() > deadline_monotonic:
                return False
            time.sleep(_FREEZE_PAUSE_SECONDS)
        return True

    def thaw(self, sandbox_id: str) -> None:
        """Lets a frozen group go on. Harmless for one that is not, or is gone."""
        for place in self._freezers(sandbox_id):
            with contextlib.suppress(OSError):
                place.thaw()

    def _freezers(self, sandbox_id: str) -> list[Freezer]:
        found = [freezer for freezer in map(freezer_of, self.folders(sandbox_id)) if freezer is not None]
        return sorted(found, key=lambda freezer: not freezer.unified)

    def kill(self, sandbox_id: str) -> None:
        """One round of SIGKILL to everything in the groups."""
        self.thaw(sandbox_id)
        for folder in self.folders(sandbox_id):
            with contextlib.suppress(OSError):
                if (folder / "cgroup.kill").exists():
                    (folder / "cgroup.kill").write_text("1")
        for pid in self.processes(sandbox_id):
            self._kill_member(sandbox_id, pid)

    def _kill_member(self, sandbox_id: str, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            try:
                # Looked up again behind the descriptor: a pid that was reused meanwhile is in another group.
                if self.contains(sandbox_id, pid):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            finally:
                os.close(descriptor)

    def contains(self, sandbox_id: str, pid: int) -> bool:
        """Whether the process `pid` is, or was when it ended, in one of the sandbox's groups."""
        inside = self.path(sandbox_id)
        paths = (path.removesuffix(" (deleted)") for path in groups_of(pid))
        return any(path == inside or path.startswith(f"{inside}/") for path in paths)

    def contains_any(self, pid: int) -> bool:
        """Whether the process `pid` is, or was when it ended, in any sandbox of ours."""
        return any(path.startswith(f"/{self.parent}/") for path in groups_of(pid))

    def remove(self, sandbox_id: str, timeout_seconds: float) -> None:
        """Kills and removes until no group is left. Blocking. Raises `TimeoutError`."""
        self.thaw(sandbox_id)  # what is frozen does not end, whatever signal it gets
        deadline_monotonic = time.monotonic() + timeout_seconds
        delay_seconds = 0.0005
        # Most often all are in the first hierarchy we look at; what is only in another one, the second loop finds.
        while members := self.members(sandbox_id):
            for pid in members:
                self._kill_member(sandbox_id, pid)
            delay_seconds = _pause(delay_seconds, deadline_monotonic, self.path(sandbox_id))
        while not all([_remove_tree(hierarchy / self._place(sandbox_id)) for hierarchy in self.hierarchies]):  # noqa: C419 -- each is to be tried
            self.kill(sandbox_id)
            delay_seconds = _pause(delay_seconds, deadline_monotonic, self.path(sandbox_id))

    def usage(self, sandbox_id: str) -> Usage:
        """Raises `FileNotFoundError` when the groups are gone."""
        return self._usage_v2(sandbox_id) if self.unified else self._usage_v1(sandbox_id)

    def oom_kills(self, sandbox_id: str) -> int:
        """How often the kernel killed in here for want of memory; 0 when unknown."""
        name = "memory.events" if self.unified else "memory.oom_control"
        for folder in self.folders(sandbox_id):
            with contextlib.suppress(OSError):
                return _fields(folder / name).get("oom_kill", 0)
        return 0

    def _usage_v2(self, sandbox_id: str) -> Usage:
        folder = self.hierarchies[0] / self._place(sandbox_id)
        cpu_seconds = _fields(folder / "cpu.stat")["usage_usec"] / 1e6
        memory_bytes = int((folder / "memory.current").read_text())
        reclaimable_bytes = _fields(folder / "memory.stat").get("inactive_file", 0)
        return Usage(cpu_seconds=cpu_seconds, memory_bytes=max(0, memory_bytes - reclaimable_bytes))

    def _usage_v1(self, sandbox_id: str) -> Usage:
        cpu_seconds = int(self._file("cpuacct.usage", sandbox_id).read_text()) / 1e9
        memory_bytes = int(self._file("memory.usage_in_bytes", sandbox_id).read_text())
        reclaimable_bytes = _fields(self._file("memory.stat", sandbox_id)).get("total_inactive_file", 0)
        return Usage(cpu_seconds=cpu_seconds, memory_bytes=max(0, memory_bytes - reclaimable_bytes))

    def _file(self, name: str, sandbox_id: str) -> Path:
        for folder in self.folders(sandbox_id):
            if (folder / name).exists():
                return folder / name
        raise FileNotFoundError(errno.ENOENT, name)


def _hierarchies(root: Path) -> tuple[Path, ...]:
    """Mounted hierarchies below `root`; co-mounted controllers (`cpu,cpuacct`) have links to one folder."""
    with contextlib.suppress(OSError):
        folders = {entry.resolve() for entry in root.iterdir() if (entry / "cgroup.procs").exists()}
        return tuple(sorted(folders))
    return ()


def groups_of(pid: int) -> list[str]:
    """A process's groups, one per hierarchy (cgroups(7)); empty when there is no such process."""
    try:
        lines = Path("/proc", str(pid), "cgroup").read_text().splitlines()
    except OSError:
        return []
    return [line.split(":", 2)[2] for line in lines]


def _processes(folder: Path) -> set[int]:
    """Pids in a group and in those below it; the latter exist only if something inside was allowed to make them."""
    pids: set[int] = set()
    try:
        pids.update(map(int, (folder / "cgroup.procs").read_text().split()))
        below = os.stat(folder).st_nlink > 2
    except OSError:
        return pids
    if below:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pids |= _processes(Path(entry.path))
    return pids - {0}


def _pause(delay_seconds: float, deadline_monotonic: float, path: str) -> float:
    """Waits, and returns for how long to wait the next time."""
    if time.monotonic() > deadline_monotonic:
        raise TimeoutError(f"control group {path} does not empty")
    time.sleep(delay_seconds)
    return min(delay_seconds * 2, 0.02)


def _remove_tree(folder: Path) -> bool:
    """True once the group is gone. Groups that the workload's own tools made below it go too."""
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        return True
    except OSError:
        for path, _, _ in os.walk(folder, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(path)
        return not folder.exists()
    return True


def _fields(file: Path) -> dict[str, int]:
    """A file of `name value` lines."""
    pairs = (line.split() for line in file.read_text().splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
