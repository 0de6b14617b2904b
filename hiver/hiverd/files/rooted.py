"""Opening, listing and removing files below a hostile root (PROTOCOL 3.10). All of it blocks: for worker threads.

Everything starts at a descriptor of the sandbox's root. The kernel resolves (openat2 with RESOLVE_IN_ROOT), so that
neither `..`, nor an absolute link, nor a directory swapped for a link at the wrong moment leads outside; magic links
(`/proc/1/root`, `/proc/self/fd/3`) are refused. What is changed is named by (descriptor of its directory, last
component) and never resolved a second time.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Generator
from contextlib import suppress
from typing import Final, NamedTuple

from hiverd.files import linux

_RESOLVE: Final = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS
_RACE_RETRIES: Final = 200
_MAX_LINKS: Final = 40

O_PATH: Final = os.O_PATH
_READ_FLAGS: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""O_NONBLOCK: a lease held by a process of the sandbox would otherwise hold the open for 45 seconds."""

PSEUDO_FILESYSTEMS: Final = frozenset(
    {
        0x9FA0,  # proc
        0x62656572,  # sysfs
        0x27E0EB,  # cgroup
        0x63677270,  # cgroup2
        0x64626720,  # debugfs
        0x74726163,  # tracefs
        0x73636673,  # securityfs
        0xF97CFF8C,  # selinux
        0x43415D53,  # smack
        0x5A3C69F0,  # apparmor
        0xCAFE4A11,  # bpf
        0xDE5E81E4,  # efivarfs
        0x6165676C,  # pstore
        0x62656570,  # configfs
        0x42494E4D,  # binfmt_misc
        0x65735543,  # fusectl
        0x6E736673,  # nsfs
        0x50495045,  # pipefs
        0x534F434B,  # sockfs
        0x09041934,  # anonymous inodes
        0x1CD1,  # devpts
        0x19800202,  # mqueue
        0x187,  # autofs
        0x67596969,  # rpc_pipefs
        0x7655821,  # resctrl
        0x6C6F6F70,  # binderfs
    }
)
"""File systems whose "files" are switches of the host's kernel. The server is the host's root: through them a link
planted in a sandbox could read or turn what the sandbox itself must not, so the file API keeps out of them."""


class NotRegularError(OSError):
    """What the path names is not a regular file: a directory, FIFO, device, socket, or a file of the kernel's own."""


class Entry(NamedTuple):
    name: bytes
    is_directory: bool
    size: int
    """Bytes; 0 for directories."""


def _not_regular(detail: str) -> NotRegularError:
    return NotRegularError(errno.EINVAL, detail)


def open_in_root(root_fd: int, path: bytes, flags: int) -> int:
    """Resolves `path` inside the root, following links there. Raises OSError; EAGAIN if renames kept racing."""
    for _ in range(_RACE_RETRIES):
        try:
            return linux.openat2(root_fd, path, flags, _RESOLVE)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EINTR):
                raise
    raise OSError(errno.EAGAIN, "the path keeps changing")


def refuse_pseudo(fd: int) -> None:
    """Raises `NotRegularError` for a descriptor on procfs, sysfs and their like."""
    if linux.filesystem_magic(fd) in PSEUDO_FILESYSTEMS:
        raise _not_regular("belongs to the kernel")


def reopen(fd: int, flags: int) -> int:
    """A descriptor for I/O from an O_PATH one: the same inode, whatever its name means by now."""
    return os.open(f"/proc/self/fd/{fd}", flags)


def open_regular(root_fd: int, path: bytes) -> tuple[int, int]:
    """A descriptor for reading a regular file, and its size in bytes. Nothing but a regular file is ever opened."""
    found = open_in_root(root_fd, path, O_PATH)
    try:
        info = os.fstat(found)
        if stat.S_ISDIR(info.st_mode):
            raise _not_regular("is a directory")
        if not stat.S_ISREG(info.st_mode):
            raise _not_regular("is not a regular file")
        refuse_pseudo(found)
        fd = reopen(found, _READ_FLAGS)
    finally:
        os.close(found)
    try:
        return fd, os.fstat(fd).st_size
    except BaseException:
        os.close(fd)
        raise


def open_directory(root_fd: int, path: bytes) -> int:
    """A descriptor for listing. ENOTDIR for anything else; a FIFO in that place is not opened either."""
    return open_in_root(root_fd, path, os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK)


def entries(directory_fd: int) -> Generator[Entry]:
    """The entries of a directory in the file system's order. What vanishes meanwhile is left out."""
    with os.scandir(directory_fd) as scan:
        for item in scan:
            try:
                info = item.stat(follow_symlinks=False)
            except OSError:
                continue
            is_directory = stat.S_ISDIR(info.st_mode)
            yield Entry(os.fsencode(item.name), is_directory, 0 if is_directory else info.st_size)


def is_mounted(parent_fd: int, name: bytes) -> bool:
    """Whether something is mounted on this name inside the sandbox.

    The sandbox's mounts are not mounts of the server's own namespace, so that the kernel would not say EBUSY but let
    the name go and unmount what the sandbox has there.
    """
    try:
        os.close(linux.openat2(parent_fd, name, O_PATH | os.O_NOFOLLOW, linux.RESOLVE_NO_XDEV))
    except OSError as error:
        return error.errno == errno.EXDEV
    return False


def remove(root_fd: int, path: bytes) -> None:
    """Removes a file, a link (not its target) or an empty directory. `path` is clean and not `/`.

    EBUSY for what is a mount inside the sandbox.
    """
    parent, name = os.path.split(path)
    parent_fd = open_in_root(root_fd, parent, O_PATH | os.O_DIRECTORY)
    try:
        refuse_pseudo(parent_fd)
        if is_mounted(parent_fd, name):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        try:
            os.unlink(name, dir_fd=parent_fd)
        except (IsADirectoryError, PermissionError):
            # POSIX lets unlink of a directory be EPERM as well as EISDIR.
            info = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
            if not stat.S_ISDIR(info.st_mode):
                raise
            os.rmdir(name, dir_fd=parent_fd)
    finally:
        os.close(parent_fd)


def open_parent(root_fd: int, path: bytes) -> int:
    """An O_PATH descriptor of a directory, made with all its parents (mode 0755) where missing.

    Must run inside `linux.creating_as`, so that what it makes is never seen with another owner.
    """
    try:
        return open_in_root(root_fd, path, O_PATH | os.O_DIRECTORY)
    except FileNotFoundError:
        pass
    parts = path.strip(b"/").split(b"/")
    current = open_in_root(root_fd, b"/", O_PATH | os.O_DIRECTORY)
    for count, name in enumerate(parts, 1):
        try:
            # Always by the whole prefix: links in it are resolved against the root, not against `current`.
            following = _open_or_make(root_fd, b"/" + b"/".join(parts[:count]), current, name)
        finally:
            os.close(current)
        current = following
    return current


def _open_or_make(root_fd: int, prefix: bytes, parent_fd: int, name: bytes) -> int:
    with suppress(FileNotFoundError):
        return open_in_root(root_fd, prefix, O_PATH | os.O_DIRECTORY)
    refuse_pseudo(parent_fd)
    with suppress(FileExistsError):
        os.mkdir(name, 0o755, dir_fd=parent_fd)
        _set_mode_of_new_directory(parent_fd, name)
    return open_in_root(root_fd, prefix, O_PATH | os.O_DIRECTORY)


def _set_mode_of_new_directory(parent_fd: int, name: bytes) -> None:
    """The server's umask is private and must not show inside. Harmless if the sandbox swaps the name meanwhile."""
    with suppress(OSError):
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd)
        try:
            if stat.S_IMODE(os.fstat(fd).st_mode) & 0o777 != 0o755:
                os.fchmod(fd, 0o755)
        finally:
            os.close(fd)


class Target(NamedTuple):
    """Where a file is to be written: its directory, its name there, and what has that name now."""

    parent_fd: int
    name: bytes
    existing: os.stat_result | None
    mounted: bool
    """It is a mount of its own, so its name cannot be given to another file."""


def locate_target(root_fd: int, path: bytes) -> Target:
    """Finds or makes the directory for a file, following links at the last component like `open(2)` would.

    The caller closes `parent_fd`. Raises IsADirectoryError, `NotRegularError`, ELOOP. Inside `linux.creating_as`.
    """
    directory, name = os.path.split(path)
    parent_fd = open_parent(root_fd, directory)
    for _ in range(_MAX_LINKS):
        try:
            refuse_pseudo(parent_fd)
            link = _link_target(parent_fd, name)
            if link is None:
                return Target(parent_fd, name, _stat_existing(parent_fd, name), is_mounted(parent_fd, name))
            directory, name = _split_link(directory, link)
            following = open_in_root(root_fd, directory, O_PATH | os.O_DIRECTORY)
        except BaseException:
            os.close(parent_fd)
            raise
        os.close(parent_fd)
        parent_fd = following
    os.close(parent_fd)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _split_link(directory: bytes, link: bytes) -> tuple[bytes, bytes]:
    """Directory (left to the kernel to resolve: `..` after a link is not lexical) and last component of a target."""
    base, name = os.path.split(link if link.startswith(b"/") else directory + b"/" + link)
    if name in (b"", b".", b".."):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return base or b"/", name


def _link_target(parent_fd: int, name: bytes) -> bytes | None:
    try:
        return os.readlink(name, dir_fd=parent_fd)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return None
        raise


def _stat_existing(parent_fd: int, name: bytes) -> os.stat_result | None:
    try:
        info = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(info.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(info.st_mode):
        raise _not_regular("is not a regular file")
    return info
