"""Loop devices and their mounts by ioctl, without the `mount` and `losetup` programs. Everything here blocks.

Devices are attached with LO_FLAGS_AUTOCLEAR: the kernel frees one as soon as nothing uses it, so neither an unmount
nor a killed server can leak it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from hiverd.files import linux

_LOOP_CTL_GET_FREE: Final = 0x4C82
_LOOP_CONFIGURE: Final = 0x4C0A
_LOOP_GET_STATUS64: Final = 0x4C05
_LO_FLAGS_AUTOCLEAR: Final = 4
_BLOCK_BYTES: Final = 4096
_FS_IOC_SHUTDOWN: Final = 0x8004587D
_SHUTDOWN_WITHOUT_FLUSH: Final = 2
_ATTEMPTS: Final = 50
_LOOP_MAJOR: Final = 7
_EXT4_ROOT_INODE: Final = 2
_INFO: Final = struct.Struct("=QQQQQIIII64s64s32sQQ")
"""`struct loop_info64` of linux/loop.h; flags are the ninth member."""

_MOUNT_FLAGS: Final = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOATIME
_MOUNT_OPTIONS: Final = "discard,noinit_itable,errors=continue"
"""discard: what a sandbox deletes is given back to the host. noinit_itable: the kernel would fill the sparse file."""


@contextmanager
def attached(image: Path) -> Iterator[str]:
    """Attaches an image and yields the device's path; the device lives on only if it gets mounted meanwhile."""
    with _opened(str(image), os.O_RDWR) as backing:
        for _ in range(_ATTEMPTS):
            with _opened("/dev/loop-control", os.O_RDWR) as control:
                number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            device = f"/dev/loop{number}"
            with _opened(device, os.O_RDWR) as loop:
                try:
                    _configure(loop, backing, image)
                except OSError as error:
                    if error.errno == errno.EBUSY:  # somebody else was faster
                        continue
                    raise
                yield device
                return
    raise OSError(errno.EBUSY, "no free loop device")


def _configure(loop: int, backing: int, image: Path) -> None:
    name = os.fsencode(image)[-63:]
    info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, _LO_FLAGS_AUTOCLEAR, name, b"", b"", 0, 0)
    fcntl.ioctl(loop, _LOOP_CONFIGURE, struct.pack("=II", backing, _BLOCK_BYTES) + info + bytes(64))


def device_of(image: Path) -> str | None:
    """The loop device that an image is attached to, whoever mounted it and in whichever namespace; None if none.

    A second device over the same image would corrupt it; the same device may be mounted again.
    """
    wanted = image.stat()
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        device = f"/dev/{entry.parts[3]}"
        with suppress(OSError), _opened(device, os.O_RDONLY) as loop:
            buffer = bytearray(_INFO.size)
            fcntl.ioctl(loop, _LOOP_GET_STATUS64, buffer)
            _, inode, *_ = values = _INFO.unpack(bytes(buffer))
            if inode == wanted.st_ino and values[0] == _kernel_device(wanted.st_dev):
                return device
    return None


def _kernel_device(device: int) -> int:
    """`new_encode_dev` of the kernel, as LOOP_GET_STATUS64 reports `lo_device` (huge_encode_dev for 64 bits)."""
    major, minor = os.major(device), os.minor(device)
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def mount_image(image: Path, folder: Path) -> None:
    """Mounts an image, through the device it is attached to already if there is one."""
    device = device_of(image)
    if device is not None:
        linux.mount(device, str(folder), "ext4", _MOUNT_FLAGS, _MOUNT_OPTIONS)
        return
    mount_new_image(image, folder)


def mount_new_image(image: Path, folder: Path) -> None:
    """Mounts an image that certainly is attached nowhere."""
    with attached(image) as device:
        linux.mount(device, str(folder), "ext4", _MOUNT_FLAGS, _MOUNT_OPTIONS)


def discard_mounts(folder: Path) -> None:
    """Unmounts all that is mounted on a folder and forgets what was not written yet. No error if nothing is.

    The file system is shut down first, as writing gigabytes back into an image that is about to be deleted took
    seconds here, and whoever still writes there gets errors instead of holding the disk.
    """
    while True:
        _shut_down(folder)
        try:
            linux.umount(str(folder))
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                return
            if error.errno != errno.EBUSY:
                raise
            linux.umount(str(folder), linux.MNT_DETACH)


def _shut_down(folder: Path) -> None:
    """Shuts down the file system mounted here, if it surely is one of ours: the root of an ext4 on a loop device.

    On an unmounted folder the descriptor would belong to the host's own file system, which must never be shut down.
    """
    if not is_mount_point(folder):
        return
    with suppress(OSError), _opened(str(folder), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW) as fd:
        info = os.fstat(fd)
        ours = info.st_ino == _EXT4_ROOT_INODE and os.major(info.st_dev) == _LOOP_MAJOR
        if ours and info.st_dev != folder.parent.stat().st_dev and linux.filesystem_magic(fd) == linux.EXT4_MAGIC:
            fcntl.ioctl(fd, _FS_IOC_SHUTDOWN, struct.pack("=I", _SHUTDOWN_WITHOUT_FLUSH))


def is_mount_point(folder: Path) -> bool:
    """True if another file system is mounted on the folder."""
    try:
        return folder.lstat().st_dev != folder.parent.lstat().st_dev
    except FileNotFoundError:
        return False


@contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
