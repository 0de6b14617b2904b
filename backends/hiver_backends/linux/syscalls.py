"""Linux system calls that Python 3.11 does not offer. Each raises `OSError` with the kernel's errno.

The numbers from 424 on are the same on every architecture that Linux supports. Calls through `ctypes` release the GIL,
so they belong in worker threads when they may block.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_SYS_OPEN_TREE: Final = 428
_SYS_MOVE_MOUNT: Final = 429
_SYS_OPENAT2: Final = 437
_SYS_MOUNT_SETATTR: Final = 442

AT_FDCWD: Final = -100
AT_EMPTY_PATH: Final = 0x1000
AT_RECURSIVE: Final = 0x8000

CLONE_FS: Final = 0x200
CLONE_NEWNS: Final = 0x20000
CLONE_NEWUSER: Final = 0x10000000
_CLONE_VM: Final = 0x100
_STACK_BYTES: Final = 16384

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
MS_SLAVE: Final = 1 << 19
MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8

OPEN_TREE_CLONE: Final = 1
OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH: Final = 4
MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40

MOUNT_ATTR_RDONLY: Final = 1
MOUNT_ATTR_NOSUID: Final = 2
MOUNT_ATTR_NODEV: Final = 4
MOUNT_ATTR_IDMAP: Final = 0x100000

RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_IN_ROOT: Final = 0x10

_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_GET_CHILD_SUBREAPER: Final = 37

IN_MODIFY: Final = 0x2
IN_CLOSE_WRITE: Final = 0x8
IN_MOVED_TO: Final = 0x80
IN_CREATE: Final = 0x100
IN_ONLYDIR: Final = 0x1000000


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)."""
    result = _libc.mount(
        source.encode(),
        target.encode(),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        data.encode() if data else None,
    )
    _check(result, f"mount {target}")


def umount(target: str, flags: int = MNT_DETACH | UMOUNT_NOFOLLOW) -> None:
    """umount2(2); lazily by default, so that open files do not hold a mount."""
    _check(_libc.umount2(target.encode(), flags), f"umount {target}")


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    _check(_libc.pivot_root(new_root.encode(), put_old.encode()), f"pivot_root {new_root}")


def open_tree(path: str, *, directory: int = AT_FDCWD, recursive: bool = False) -> int:
    """open_tree(2): a detached copy of the mount at `path`, as a descriptor."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (AT_RECURSIVE if recursive else 0)
    if not path:
        flags |= AT_EMPTY_PATH
    return _check(_libc.syscall(_SYS_OPEN_TREE, directory, path.encode(), flags), f"open_tree {path}")


def move_mount(tree: int, target: str, *, directory: int = AT_FDCWD) -> None:
    """move_mount(2): attaches a detached mount at `target`; an empty `target` means `directory` itself."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | (0 if target else MOVE_MOUNT_T_EMPTY_PATH)
    result = _libc.syscall(_SYS_MOVE_MOUNT, tree, b"", directory, target.encode(), flags)
    _check(result, f"move_mount {target}")


def mount_setattr(tree: int, attributes: int, *, user_namespace: int | None = None, recursive: bool = False) -> None:
    """mount_setattr(2) on a detached mount: sets `attributes` (MOUNT_ATTR_*), id-mapped by a user namespace."""
    if user_namespace is not None:
        attributes |= MOUNT_ATTR_IDMAP
    argument = struct.pack("QQQQ", attributes, 0, 0, user_namespace if user_namespace is not None else 0)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    _check(_libc.syscall(_SYS_MOUNT_SETATTR, tree, b"", flags, argument, len(argument)), "mount_setattr")


def openat2(directory: int, path: str, flags: int, *, resolve: int = RESOLVE_IN_ROOT, mode: int = 0) -> int:
    """openat2(2): opens `path` with `directory` as its root, so that no link leads out of it."""
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, mode, resolve | RESOLVE_NO_MAGICLINKS)
    result = _libc.syscall(_SYS_OPENAT2, directory, path.encode() or b".", how, len(how))
    return _check(result, f"openat2 {path}")


def write_new_file(path: str, content: bytes, *, mode: int, owner: int | None = None) -> None:
    """A new file of exactly that mode, owned by user and group `owner`. Raises `FileExistsError`.

    Half the system calls of Python's file objects, and each is a fight for the GIL while many sandboxes are made.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode & 0o700)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        if owner is not None:
            os.fchown(descriptor, owner, owner)
        if mode & 0o077:
            os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


def setns(descriptor: int, kind: int) -> None:
    """setns(2), for the calling thread only."""
    _check(_libc.setns(descriptor, kind), "setns")


def unshare(flags: int) -> None:
    """unshare(2), for the calling thread only."""
    _check(_libc.unshare(flags), "unshare")


def clone_ended(flags: int) -> int:
    """clone(2) of a child that is made with `flags` (CLONE_NEW*) and ends at once: the pid of a zombie, which the
    caller reaps. What is left of it still names the namespaces that outlive their last process, such as its user
    namespace.

    It costs a tenth of a millisecond, since the child shares our memory instead of copying its page tables and runs
    no program. All that it ever runs is libc's `_exit`, on a stack of its own and with every signal blocked, so that
    it cannot reach Python's state.
    """
    stack = ctypes.create_string_buffer(_STACK_BYTES)
    top = (ctypes.addressof(stack) + _STACK_BYTES) & ~0xF
    entry = ctypes.cast(_libc._exit, ctypes.c_void_p)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        result = _libc.clone(entry, ctypes.c_void_p(top), flags | _CLONE_VM | signal.SIGCHLD, ctypes.c_void_p(0))
        pid = _check(result, "clone")
        # The stack is ours to free only once the child no longer runs on it.
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def set_child_subreaper(enabled: bool) -> bool:
    """Makes this process the parent of orphaned descendants; returns what was set before (prctl(2))."""
    before = ctypes.c_int(0)
    _check(_libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0), "prctl")
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, int(enabled), 0, 0, 0), "prctl")
    return bool(before.value)


def inotify_init() -> int:
    """inotify_init1(2), non-blocking."""
    return _check(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify_init1")


def inotify_add_watch(descriptor: int, path: str, mask: int) -> int:
    """inotify_add_watch(2)."""
    return _check(_libc.inotify_add_watch(descriptor, path.encode(), mask), f"inotify_add_watch {path}")


def inotify_rm_watch(descriptor: int, watch: int) -> None:
    """inotify_rm_watch(2)."""
    _check(_libc.inotify_rm_watch(descriptor, watch), "inotify_rm_watch")
