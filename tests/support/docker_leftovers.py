"""Finds and removes what an Engine of the tests left on the host: everything of it bears its name."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from support.waiting import until

_CGROUP_ROOT: Final = Path("/sys/fs/cgroup")


def processes_naming(text: str) -> list[int]:
    """Processes, zombies left out, whose command line has this text."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if text.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def _parents() -> dict[int, int]:
    """Every process's parent."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def _descendants(roots: list[int]) -> Iterator[int]:
    """Below a shim: its containers' processes."""
    parents = _parents()
    seen = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in seen} - seen:
        seen |= more
        yield from more


def kill_all(text: str, *, seconds: float) -> None:
    """The processes that name it and what they have started. Again and again, as some start others."""

    def gone() -> bool:
        roots = processes_naming(text)
        for pid in [*roots, *_descendants(roots)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not roots

    until(gone, seconds=seconds, what=f"no process names {text}")


def unmount_below(folder: Path) -> None:
    """The newest first; lazily, so that nothing can hold it up."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    targets = [line.split()[4].encode().decode("unicode_escape") for line in lines]
    for target in reversed(targets):
        if Path(target).is_relative_to(folder):
            subprocess.run(["umount", "--lazy", target], check=False, stderr=subprocess.DEVNULL)


def remove_cgroups(name: str) -> None:
    """Control groups of this name in every hierarchy, with those below."""
    for top in [path for path in (_CGROUP_ROOT / name, *_CGROUP_ROOT.glob(f"*/{name}")) if path.is_dir()]:
        for folder, _, _ in os.walk(top, topdown=False):
            with suppress(OSError):
                os.rmdir(folder)
