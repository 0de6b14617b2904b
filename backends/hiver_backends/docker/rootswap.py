"""Gives a container that Docker has made another root: an overlay whose changes are in the sandbox's own volume.

Docker keeps what a container changes in its own folder, where nothing bounds it. So before the workload's first
instruction our root file system takes the place of Docker's: the same image, but bounded like all of a sandbox's data,
and seen the same way from outside. /proc, /sys and /dev are taken along with all that Docker hides and protects there.

Blocking calls.
"""

from __future__ import annotations

import os
from typing import Final

from hiver_backends.linux import inside, livemounts, syscalls
from hiverd.contracts.errors import InvalidError

_SYSTEM: Final = ("proc", "sys", "dev")
_PLACE: Final = "/.hiver-root"


def make_places(root: int, owner: int) -> None:
    """Folders for the system's own mounts in a new root. Raises `InvalidError` if the image has links there."""
    for name in _SYSTEM:
        try:
            os.close(inside.make_directory(root, name, (owner, owner)))
            os.close(_open_place(root, name))
        except OSError as error:
            raise InvalidError(f"the image has no folder at /{name}, but something else", field="image") from error


def replace(pid: int, target: str) -> None:
    """Moves what is mounted at `target` on the host into the container of process `pid`, as its root."""
    tree = syscalls.open_tree(target, recursive=True)
    try:
        livemounts.in_mount_namespace(pid, lambda: _pivot(tree))
    finally:
        os.close(tree)


def _pivot(tree: int) -> None:
    system = {name: syscalls.open_tree(f"/{name}", recursive=True) for name in _SYSTEM}
    try:
        os.mkdir(_PLACE, 0o700)
        syscalls.move_mount(tree, _PLACE)
        old = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.chdir(_PLACE)
            _bring(system)
            # Process 1 has the old root as its own: the kernel gives it the new one (pivot_root(2)).
            syscalls.pivot_root(".", ".")
            os.fchdir(old)
            # Where the Engine's own mount is below ours, it would be seen.
            os.rmdir(_PLACE.lstrip("/"))
            syscalls.mount("", ".", None, syscalls.MS_REC | syscalls.MS_SLAVE)
            syscalls.umount(".", syscalls.MNT_DETACH)
        finally:
            os.close(old)
    finally:
        for descriptor in system.values():
            os.close(descriptor)


def _bring(system: dict[str, int]) -> None:
    root = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name, descriptor in system.items():
            place = _open_place(root, name)
            try:
                syscalls.move_mount(descriptor, "", directory=place)
            finally:
                os.close(place)
    finally:
        os.close(root)


def _open_place(root: int, name: str) -> int:
    resolve = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_SYMLINKS
    return syscalls.openat2(root, name, os.O_PATH | os.O_DIRECTORY, resolve=resolve)
