"""Files that processes have mapped to write to. Writing to memory changes no time of the file until the kernel gets
round to it (mmap(2)), so that such a file must be taken for a changed one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def mapped_files(processes: Iterable[int]) -> frozenset[int]:
    """Numbers of the inodes. A process that has ended has none (proc_pid_maps(5))."""
    found: set[int] = set()
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/maps").read_bytes().splitlines()
        except OSError:
            continue
        for line in lines:
            fields = line.split(None, 5)
            if fields[1][1:2] == b"w" and fields[1][3:4] == b"s" and fields[4] != b"0":
                found.add(int(fields[4]))
    return frozenset(found)
