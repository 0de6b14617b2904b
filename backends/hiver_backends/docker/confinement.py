"""Whether a container is confined as it was asked for: an Engine may pass over in silence what it does not know."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from hiver_backends.linux import bundle
from hiver_backends.linux.rootfs import unescape

_FILTERED: Final = "2"
"""SECCOMP_MODE_FILTER."""


def missing(pid: int, *, seccomp: bool) -> list[str]:
    """What a container lacks, by its process 1; empty if it is confined. `seccomp`: it was to have a filter. Blocking;
    raises `OSError` if the process has ended."""
    process = Path("/proc", str(pid))
    root = process / "root"

    def exists(path: str) -> bool:
        return os.path.lexists(root / path.lstrip("/"))

    hidden = [path for path in bundle.MASKED_PATHS if exists(path)]
    read_only = [path for path in bundle.READONLY_PATHS if exists(path)]
    mounts = (process / "mountinfo").read_bytes()
    return [
        *_unprivileged((process / "status").read_text(), seccomp=seccomp),
        *judged_mounts(mounts, hidden, read_only),
    ]


def _unprivileged(status: str, *, seccomp: bool) -> list[str]:
    """By proc_pid_status(5)."""
    values = dict(line.partition(":\t")[::2] for line in status.splitlines())
    found = []
    if values.get("NoNewPrivs") != "1":
        found.append("programs may gain privileges")
    if seccomp and values.get("Seccomp") != _FILTERED:
        found.append("system calls are not filtered")
    return found


def judged_mounts(mountinfo: bytes, hidden: list[str], read_only: list[str]) -> list[str]:
    """By proc_pid_mountinfo(5): what is hidden has something mounted over it."""
    fields = [line.split() for line in mountinfo.splitlines()]
    options = {unescape(words[4]): words[5].split(b",") for words in fields if len(words) > 5}
    found = [f"{path} is not hidden" for path in hidden if path not in options]
    return found + [f"{path} can be written to" for path in read_only if b"ro" not in options.get(path, ())]
