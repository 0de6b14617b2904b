"""A sandbox's root file system: an overlay of the image, id-mapped, and the sandbox's own changes. Blocking calls."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from hiverd.contracts.isolation import Mount, RootChanges

from . import inside, syscalls
from .userns import SUBORDINATE_IDS, UserNamespaces, for_owner, for_sandbox

_OVERLAY_OPTIONS: Final = (
    # File handles of the overlay are what fanotify reports. Volatile: no sandbox outlives its host's reboot, so what
    # `sync` would write for that (at each copy of an image's file, and at the end) is work for nobody. Mounts, such as
    # the workspace, are not part of the overlay and keep what they promise.
    "volatile,index=on,nfs_export=on,metacopy=off,redirect_dir=nofollow",
    "index=on,nfs_export=on,metacopy=off,redirect_dir=nofollow",
    "",
)
"""Kernels that lack options get along without."""


def upper_folder(volume: Path) -> Path:
    """Where a sandbox's changes to its root file system are."""
    return volume / "root" / "upper"


def root_changes(volume: Path, host_id: int | None) -> RootChanges:
    """For the core: what `RootFs.mount` made of a volume."""
    upper = str(upper_folder(volume))
    if host_id is None:
        return RootChanges(upper=upper)
    return RootChanges(upper=upper, first_id=host_id, id_count=SUBORDINATE_IDS)


class RootFs:
    """Mounts for sandboxes. `host_id` is None everywhere when sandboxes have no user namespace."""

    def __init__(self, namespaces: UserNamespaces) -> None:
        self._namespaces = namespaces

    def mount(
        self,
        layers: tuple[tuple[Path, str], ...],
        volume: Path,
        target: Path,
        host_id: int | None,
        etc: Mapping[str, str],
        *,
        shifted: bool = False,
    ) -> None:
        """Mounts the root file system at `target`, with the files `etc` in its /etc.

        `layers` are folders with the place where each belongs in the root ("" for the root itself, the topmost first if
        there are several; the others are mounted read-only on top, as the host's /usr is). Changes go to `volume`/root.
        `shifted`: the image's files have the sandbox's owners already, on disk. Raises `OSError`; then the caller
        unmounts what is below `target`.
        """
        bases = [folder for folder, place in layers if not place]
        upper, work = upper_folder(volume), volume / "root" / "work"
        for folder in (volume / "root", upper, work, target):
            folder.mkdir(mode=0o700, exist_ok=True)
        upper.chmod(0o755)
        os.chown(upper, host_id or 0, host_id or 0)
        with contextlib.suppress(FileNotFoundError):
            # Left by a volatile mount that has ended. It stands for a host that may have crashed since, and none of our
            # volumes outlives that: a sandbox of an earlier boot is removed with its volume.
            shutil.rmtree(work / "work" / "incompat")
        to_map = None if shifted else host_id
        seeded = len(bases) == 1 and to_map == host_id and inside.seed_etc(bases[0], upper, etc, host_id or 0)
        with self._lower(bases, target, to_map) as lower:
            _mount_overlay(lower, upper, work, target)
        if not seeded:
            _write_etc(target, etc, host_id or 0)
        for folder, place in layers:
            if place:
                _attach_layer(folder, target, place)

    @contextlib.contextmanager
    def _lower(self, bases: Sequence[Path], target: Path, host_id: int | None) -> Iterator[Sequence[Path]]:
        """The image's folders with the right owners, for as long as it takes to mount the overlay over them."""
        if host_id is None:
            yield bases
            return
        if len(bases) != 1:
            raise NotImplementedError("images in several folders are never mapped")
        # The overlay clones what it is given, so this mount may go at once; it can lie where the overlay will.
        lower = target.parent / "lower"
        lower.mkdir(mode=0o700, exist_ok=True)
        tree = syscalls.open_tree(str(bases[0]))
        try:
            with self._namespaces.borrow(for_sandbox(host_id)) as namespace:
                syscalls.mount_setattr(tree, syscalls.MOUNT_ATTR_RDONLY, user_namespace=namespace)
            syscalls.move_mount(tree, str(lower))
        finally:
            os.close(tree)
        try:
            yield (lower,)
        finally:
            syscalls.umount(str(lower))
            lower.rmdir()

    def prepare_mount(self, mount: Mount, host_id: int | None) -> int:
        """A detached mount of an operator's or a sandbox's folder, as a descriptor that the caller closes."""
        source = os.stat(mount.source)
        owner = (source.st_uid, source.st_gid)
        root = (host_id or 0, host_id or 0)
        attributes = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
        attributes |= syscalls.MOUNT_ATTR_RDONLY if mount.read_only else 0
        if mount.owned and owner != root:
            os.chown(mount.source, *root)
        tree = syscalls.open_tree(mount.source)
        try:
            if mount.owned or owner == root:
                syscalls.mount_setattr(tree, attributes)
            else:
                with self._namespaces.borrow(for_owner(*owner, root[0])) as namespace:
                    syscalls.mount_setattr(tree, attributes, user_namespace=namespace)
        except OSError:
            os.close(tree)
            raise
        return tree


def _write_etc(target: Path, etc: Mapping[str, str], host_id: int) -> None:
    root = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        inside.write_etc(root, etc, (host_id, host_id))
    finally:
        os.close(root)


def _attach_layer(folder: Path, target: Path, place: str) -> None:
    """Not id-mapped: to the sandbox's root the host's files are a stranger's, so it reads only what everybody may."""
    tree = syscalls.open_tree(str(folder), recursive=True)
    try:
        attributes = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOSUID
        syscalls.mount_setattr(tree, attributes, recursive=True)
        syscalls.move_mount(tree, str(target / place))
    finally:
        os.close(tree)


def _mount_overlay(lower: Sequence[Path], upper: Path, work: Path, target: Path) -> None:
    paths = f"lowerdir={':'.join(map(_escape, lower))},upperdir={_escape(upper)},workdir={_escape(work)}"
    for options in _OVERLAY_OPTIONS:
        try:
            data = f"{paths},{options}" if options else paths
            syscalls.mount("overlay", str(target), "overlay", syscalls.MS_NODEV, data)
        except OSError as error:
            if not options or error.errno not in {errno.EINVAL, errno.EOPNOTSUPP, errno.ESTALE}:
                raise
        else:
            return


def _escape(path: Path) -> str:
    """As overlay's option parser wants it: a backslash before colon, comma and backslash."""
    text = str(path)
    for special in ("\\", ":", ","):
        text = text.replace(special, f"\\{special}")
    return text


def mounts_below(folder: Path) -> list[str]:
    """Mount points at or below a folder, innermost first (proc_pid_mountinfo(5))."""
    prefix = f"{folder}/"
    needle = os.fsencode(folder.name)
    with Path("/proc/self/mountinfo").open("rb") as lines:
        found = [unescape(line.split()[4]) for line in lines if needle in line]
    return [target for target in reversed(found) if target == str(folder) or target.startswith(prefix)]


def unescape(field: bytes) -> str:
    """A mountinfo field: space, tab, newline and backslash come as octal escapes."""
    for octal, char in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\134", b"\\")):
        field = field.replace(octal, char)
    return os.fsdecode(field)


def unmount_below(folder: Path) -> None:
    """Takes away every mount at or below a folder."""
    for target in mounts_below(folder):
        try:
            syscalls.umount(target)
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.ENOENT}:
                raise
