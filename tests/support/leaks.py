"""Finds what a server left on the host: processes, mounts, namespaces, cgroups, loop devices, interfaces.

Everything of one server bears a mark: its data folder, its instance name, or a sandbox's id. So a check can be made
while other servers run on the same host.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from support.docker_api import OwnEngine, traces_in
from support.waiting import until

_CGROUP_ROOT: Final = Path("/sys/fs/cgroup")

engines: Final[list[OwnEngine]] = []
"""Docker Engines that are looked at as well."""


def marks_of(data_dir: Path, sandbox_ids: Iterable[str] = ()) -> frozenset[str]:
    """What names this server's belongings on the host: its folder, its instance name, its sandboxes."""
    folder = str(data_dir.resolve())
    instance = hashlib.sha256(folder.encode()).hexdigest()[:8]  # as the server derives it
    return frozenset({folder, instance, *sandbox_ids})


def traces(marks: Iterable[str]) -> list[str]:
    """One line per thing on the host that bears one of the marks."""
    wanted = tuple(marks)
    found = [
        *_processes(wanted),
        *_mounts(wanted),
        *_cgroups(wanted),
        *_named_namespaces(wanted),
        *_loop_devices(wanted),
        *_run_files(wanted),
        *(trace for engine in engines if engine.answers() for trace in traces_in(engine, wanted)),
    ]
    return sorted(set(found))


def wait_until_clean(marks: Iterable[str], *, seconds: float = 20.0) -> None:
    """Returns when nothing with a mark is left; `AssertionError` listing what is, after the deadline."""
    wanted = tuple(marks)
    try:
        until(lambda: not traces(wanted), seconds=seconds, what="host free of traces")
    except TimeoutError:
        left = traces(wanted)
        raise AssertionError("left behind:\n" + "\n".join(left)) from None


def _matches(text: str, marks: tuple[str, ...]) -> bool:
    return any(mark in text for mark in marks)


def _own_family() -> frozenset[int]:
    """This process and its ancestors: their command lines may name the data folder."""
    family = set()
    pid = os.getpid()
    while pid > 0 and pid not in family:
        family.add(pid)
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            break
        pid = int(stat.rpartition(")")[2].split()[1])
    return frozenset(family)


def left_to_init(entry: Path) -> bool:
    """Whether this folder of /proc is of a process that has ended, of which only the host's init has yet to take note:
    some look every few seconds."""
    return _read(entry / "stat").rpartition(")")[2].split()[:2] == ["Z", "1"]


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _processes(marks: tuple[str, ...]) -> Iterator[str]:
    family = _own_family()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in family:
            continue
        command = _read(entry / "cmdline").replace("\0", " ").strip()
        if _matches(command, marks):
            yield f"process {entry.name}: {command[:200]}"
        elif _matches(_read(entry / "cgroup"), marks) and not left_to_init(entry):
            yield f"process {entry.name} in a cgroup of ours: {command[:200] or _read(entry / 'comm').strip()}"
        elif _matches(_link(entry / "cwd") + _link(entry / "root"), marks):
            yield f"process {entry.name} in a folder of ours: {command[:200]}"


def _mounts(marks: tuple[str, ...]) -> Iterator[str]:
    for line in _read(Path("/proc/self/mountinfo")).splitlines():
        if _matches(line, marks):
            yield f"mount: {line.split()[4]}"


def _cgroups(marks: tuple[str, ...]) -> Iterator[str]:
    for folder, names, _files in os.walk(_CGROUP_ROOT):
        for name in names:
            if _matches(name, marks):
                yield f"cgroup: {folder}/{name}"


def _named_namespaces(marks: tuple[str, ...]) -> Iterator[str]:
    folder = Path("/run/netns")
    names = os.listdir(folder) if folder.is_dir() else []
    for name in names:
        if _matches(name, marks):
            yield f"network namespace: {name}"


def _run_files(marks: tuple[str, ...]) -> Iterator[str]:
    for folder in (Path("/run/hiver"), Path("/dev/shm")):
        names = os.listdir(folder) if folder.is_dir() else []
        for name in names:
            if _matches(name, marks):
                yield f"file: {folder}/{name}"


def _loop_devices(marks: tuple[str, ...]) -> Iterator[str]:
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        if _matches(_read(backing), marks):
            yield f"loop device {backing.parts[3]}: {_read(backing).strip()}"
