"""Writing into a root file system that may be hostile, before or while it runs. Blocking calls.

Every path is resolved with the root as its root (openat2, RESOLVE_IN_ROOT), so no link leads out to the host.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import stat
from collections.abc import Mapping
from pathlib import Path

from hiverd.contracts.isolation import RESOLVER_ADDRESS

from . import syscalls


def make_directory(root: int, path: str, owner: tuple[int, int]) -> int:
    """Opens a directory below the root, creating what is missing with `owner`. Returns an O_PATH descriptor.

    Raises `NotADirectoryError` where something else is in the way.
    """
    flags = os.O_PATH | os.O_DIRECTORY
    current = syscalls.openat2(root, ".", flags)
    walked = ""
    try:
        for name in posixpath.normpath(f"/{path}").strip("/").split("/"):
            if not name:
                continue
            walked = f"{walked}/{name}"
            try:
                deeper = syscalls.openat2(root, walked, flags)
            except FileNotFoundError:
                # Created in the directory reached so far, never through a path that may have changed meanwhile.
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o755, dir_fd=current)
                    os.chown(name, *owner, dir_fd=current, follow_symlinks=False)
                deeper = syscalls.openat2(root, walked, flags)
            os.close(current)
            current = deeper
    except BaseException:
        os.close(current)
        raise
    return current


def make_file(root: int, path: str, owner: tuple[int, int]) -> int:
    """As `make_directory`, for a file as the target of a bind mount."""
    parent, name = posixpath.split(posixpath.normpath(f"/{path}"))
    directory = make_directory(root, parent, owner)
    try:
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=directory)
            os.fchown(descriptor, *owner)
            os.close(descriptor)
        return syscalls.openat2(root, path, os.O_PATH)
    finally:
        os.close(directory)


def write_file(root: int, path: str, content: str, owner: tuple[int, int]) -> None:
    """Replaces a file (or a link in its place) by a new one with `content`, mode 0644."""
    parent, name = posixpath.split(path)
    directory = make_directory(root, parent, owner)
    try:
        try:
            os.unlink(name, dir_fd=directory)
        except FileNotFoundError:
            pass
        except IsADirectoryError as error:
            raise OSError(errno.EISDIR, f"the image has a directory at {path}") from error
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o644, dir_fd=directory)
        with os.fdopen(descriptor, "w") as file:
            os.fchown(file.fileno(), *owner)
            file.write(content)
    finally:
        os.close(directory)


def hosts(hostname: str, extra: tuple[tuple[str, str], ...]) -> str:
    """/etc/hosts (hosts(5)) with the sandbox's own name on loopback and the configured extra names."""
    lines = [
        "127.0.0.1\tlocalhost",
        "::1\tlocalhost ip6-localhost ip6-loopback",
        f"127.0.0.1\t{hostname}",
        *(f"{address}\t{name}" for name, address in extra),
    ]
    return "\n".join(lines) + "\n"


RESOLV_CONF = f"nameserver {RESOLVER_ADDRESS}\noptions timeout:5 attempts:1\n"


def identity(hostname: str, extra: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """The files of /etc that name the sandbox. They are ordinary files of its root user, who may change them."""
    return {"hosts": hosts(hostname, extra), "hostname": f"{hostname}\n", "resolv.conf": RESOLV_CONF}


def write_etc(root: int, files: Mapping[str, str], owner: tuple[int, int]) -> None:
    """Writes files of /etc through the mounted root file system."""
    for name, content in files.items():
        write_file(root, f"/etc/{name}", content, owner)


def seed_etc(image: Path, upper: Path, files: Mapping[str, str], host_id: int) -> bool:
    """Writes files of /etc straight into a fresh overlay's upper folder, before it is mounted: through the overlay it
    takes ten times as long. False, and nothing done, where that could come out differently."""
    etc = image / "etc"
    try:
        status = etc.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(status.st_mode) or os.path.lexists(upper / "etc"):
        return False
    if any((etc / name).is_dir() for name in files):
        return False
    (upper / "etc").mkdir()
    (upper / "etc").chmod(stat.S_IMODE(status.st_mode))
    os.chown(upper / "etc", host_id + status.st_uid, host_id + status.st_gid)
    for name, content in files.items():
        syscalls.write_new_file(f"{upper}/etc/{name}", content.encode(), mode=0o644, owner=host_id)
    return True
