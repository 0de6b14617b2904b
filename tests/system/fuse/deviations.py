"""Where a mount is another thing than a folder: what is done, and what a mount answers."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from system.fuse.scenarios import Scenario, opened, tried


def _hard_link(folder: Path) -> object:
    (folder / "f").write_text("x")
    return tried(os.link, folder / "f", folder / "g")


def _device(folder: Path) -> object:
    return tried(os.mknod, folder / "null", 0o20666, os.makedev(1, 3))


def _attributes(folder: Path) -> object:
    (folder / "f").write_text("x")
    return tried(os.setxattr, folder / "f", "user.a", b"1"), tried(os.getxattr, folder / "f", "user.a")


def _unnamed(folder: Path) -> object:
    result = tried(os.open, folder, os.O_TMPFILE | os.O_RDWR)
    if isinstance(result, int):
        os.close(result)
        return 0
    return result


def _deep(folder: Path) -> object:
    at = os.open(folder, os.O_RDONLY)
    try:
        for _ in range(30):
            result = tried(os.mkdir, "d" * 200, dir_fd=at)
            if result is not None:
                return result
            below = os.open("d" * 200, os.O_RDONLY, dir_fd=at)
            os.close(at)
            at = below
    finally:
        os.close(at)
    return None


def _flags(folder: Path) -> object:
    (folder / "f").write_text("x")
    with opened(folder / "f", os.O_RDONLY) as fd:
        result = tried(fcntl.ioctl, fd, 0x80086601, bytes(8))
        return result if result == "ENOTTY" else 0


def _path_handle(folder: Path) -> object:
    (folder / "f").write_text("x")
    fd = os.open(folder / "f", os.O_PATH)
    try:
        os.unlink(folder / "f")
        return tried(lambda: os.fstat(fd).st_size)
    finally:
        os.close(fd)


DEVIATIONS: dict[str, tuple[Scenario, object]] = {
    "Hard links": (_hard_link, "EPERM"),
    "Device nodes": (_device, "EPERM"),
    "Extended attributes": (_attributes, ("ENOTSUP", "ENOTSUP")),
    "`O_TMPFILE`": (_unnamed, "ENOTSUP"),
    "Paths of more than 4,095 bytes": (_deep, "ENAMETOOLONG"),
    "Inode flags": (_flags, "ENOTTY"),
    "Attributes of a removed file by an `O_PATH` descriptor": (_path_handle, "ENOENT"),
}
