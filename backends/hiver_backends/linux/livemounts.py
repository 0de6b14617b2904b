"""Mounts of a running workload. Blocking calls."""

from __future__ import annotations

import os
import posixpath
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from hiverd.contracts.errors import InvalidError
from hiverd.contracts.isolation import Mount

from . import inside, syscalls
from .rootfs import RootFs, unescape

_T = TypeVar("_T")
_SYSTEM: Final = ("/proc", "/sys", "/dev")


class MountPoint(NamedTuple):
    """One line of /proc/<pid>/mountinfo (proc_pid_mountinfo(5))."""

    device: str
    root: str
    """The mounted folder, relative to its own file system."""
    target: str


def _normal(target: str) -> str:
    """Without `.`, `..` and doubled slashes; POSIX would let two leading ones stand."""
    return "/" + posixpath.normpath(target).lstrip("/")


def check_target(target: str) -> None:
    """Raises `InvalidError` for a place where no mount may go."""
    path = _normal(target)
    if not target.startswith("/") or path == "/" or "\0" in target:
        raise InvalidError(f"a mount's target must be an absolute path below /: {target!r}", field="mount")
    if any(path == system or path.startswith(f"{system}/") for system in _SYSTEM):
        raise InvalidError(
            f"nothing can be mounted at {target}: /proc, /sys and /dev are the sandbox's own", field="mount"
        )


def attach_all(rootfs: RootFs, root: int, mounts: tuple[Mount, ...], host_id: int | None) -> None:
    """Attaches a new sandbox's mounts below its root, on the host, before the runtime takes it over."""
    for mount in sorted(mounts, key=lambda each: each.target.rstrip("/").count("/")):
        check_target(mount.target)
        tree = rootfs.prepare_mount(mount, host_id)
        try:
            directory = _target_directory(root, mount.target, host_id)
            try:
                syscalls.move_mount(tree, "", directory=directory)
            finally:
                os.close(directory)
        finally:
            os.close(tree)


def _target_directory(root: int, target: str, host_id: int | None) -> int:
    """Opens the folder on which a mount goes, made if need be. The image or the workload may have put links there."""
    try:
        directory = inside.make_directory(root, target, (host_id or 0, host_id or 0))
    except (NotADirectoryError, FileNotFoundError):
        message = f"cannot mount at {target}: a file or a link that leads nowhere is in the way"
        raise InvalidError(message, field="mount") from None
    try:
        # Seen from the sandbox's root: a link must not lead to where a mount may not go.
        base = os.readlink(f"/proc/self/fd/{root}").rstrip("/")
        check_target(os.readlink(f"/proc/self/fd/{directory}").removeprefix(base))
    except BaseException:
        os.close(directory)
        raise
    return directory


def attach_live(rootfs: RootFs, pid: int, open_root: Callable[[], int], mount: Mount, host_id: int | None) -> None:
    """Attaches a mount in the mount namespace of a running workload, whose process 1 is `pid`."""
    check_target(mount.target)
    tree = rootfs.prepare_mount(mount, host_id)
    try:
        root = open_root()
        try:
            directory = _target_directory(root, mount.target, host_id)
        finally:
            os.close(root)
        try:
            in_mount_namespace(pid, lambda: syscalls.move_mount(tree, "", directory=directory))
        finally:
            os.close(directory)
    finally:
        os.close(tree)


def detach_live(pid: int, open_root: Callable[[], int], target: str) -> None:
    """Takes the mount at exactly `target` (as in mountinfo) out of a running workload's namespace."""
    parent, name = posixpath.split(target)
    root = open_root()
    try:
        # No links on the way: the workload could have put one there to make us take another mount away.
        resolve = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_SYMLINKS
        directory = syscalls.openat2(root, parent, os.O_PATH | os.O_DIRECTORY, resolve=resolve)
    finally:
        os.close(root)

    def detach() -> None:
        os.fchdir(directory)
        syscalls.umount(name)

    try:
        in_mount_namespace(pid, detach)
    finally:
        os.close(directory)


def in_mount_namespace(pid: int, work: Callable[[], _T]) -> _T:
    """Runs `work` in a thread of its own inside another mount namespace.

    The thread ends afterwards: what it has entered, no other work may ever see.
    """
    outcome: list[_T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            try:
                syscalls.unshare(syscalls.CLONE_FS)
                syscalls.setns(namespace, syscalls.CLONE_NEWNS)
            finally:
                os.close(namespace)
            outcome.append(work())
        except BaseException as error:  # noqa: BLE001 -- carried over to the waiting thread
            failure.append(error)

    thread = threading.Thread(target=run, name="mount-namespace", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def mount_points(pid: int) -> list[MountPoint]:
    """The workload's mounts that are neither its root nor part of its /proc, /sys and /dev."""
    points = []
    for line in Path("/proc", str(pid), "mountinfo").read_bytes().splitlines():
        fields = line.split()
        target = unescape(fields[4])
        if target != "/" and not any(target == system or target.startswith(f"{system}/") for system in _SYSTEM):
            points.append(MountPoint(fields[2].decode(), unescape(fields[3]), target))
    return points


def identity(root: int, path: str) -> tuple[int, int] | None:
    """Device and inode of a folder of the sandbox; None if it is not there."""
    try:
        descriptor = syscalls.openat2(root, path, os.O_PATH | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        stat = os.fstat(descriptor)
        return stat.st_dev, stat.st_ino
    finally:
        os.close(descriptor)


def source_identity(source: str) -> tuple[int, int] | None:
    """Device and inode of a mount's source; None if it is gone."""
    try:
        stat = os.stat(source)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def find(pid: int, open_root: Callable[[], int], targets: dict[str, str]) -> dict[str, str]:
    """Where in the running workload our mounts are: target as configured -> mount point now.

    `targets` gives each target's source. They are told by what is mounted, not by name: an image's links may lead the
    target elsewhere, and the workload may rename the folders above a mount.
    """
    points = mount_points(pid)
    root = open_root()
    try:
        identities = {point.target: identity(root, point.target) for point in points}
    finally:
        os.close(root)
    found: dict[str, str] = {}
    for target, source in targets.items():
        wanted = source_identity(source)
        matches = [point for point, seen in identities.items() if seen is not None and seen == wanted]
        literal = _normal(target)
        if literal in matches or (wanted is None and literal in identities):
            found[target] = literal
        elif matches:
            found[target] = matches[-1]
    return found
