"""Attributes as the kernel wants them, and who owns what."""

from __future__ import annotations

import os
from typing import Final

from msgspec import Struct

from hiverd.fuse import abi

NOBODY: Final = 65534
_NANOSECONDS: Final = 1_000_000_000


class Caching(Struct, frozen=True):
    """How long the kernel may believe what it was told, in seconds."""

    entry_seconds: float
    attribute_seconds: float
    negative_seconds: float
    """For names that do not exist."""
    keep_pages: bool
    """True: nobody but this mount changes the folder, so pages stay good from one open to the next."""


OWNED: Final = Caching(3600.0, 3600.0, 1.0, keep_pages=True)
"""The folder is ours alone. Names that are missing are not known to us one by one, so they cannot be made forgotten
when rules change; hence their second."""
SHARED: Final = Caching(1.0, 1.0, 0.0, keep_pages=False)
"""Others change the folder too."""


class Owners:
    """Ids in the folder are ids outside: what a process creates belongs to it."""

    keeps_chown: bool = True
    """False: the folder's owners are not the sandbox's to change."""

    def shown(self, uid: int, gid: int) -> tuple[int, int]:
        """Who the owner of something in the folder is for the sandbox."""
        return uid, gid

    def creator(self, uid: int, gid: int) -> tuple[int, int]:
        """Who owns in the folder what this caller creates."""
        return uid, gid

    def give_root(self, uid: int | None, gid: int | None) -> None:
        """The mount's own directory was given to somebody, in a mount that does not keep that."""


class FolderOwner(Owners):
    """For a folder of the operator: whoever owns the mount's directory stands for the folder's owner, both ways.

    Owners never change in the folder. Everybody else's objects are nobody's, and everything that is created belongs to
    the folder's owner, since no other id of a sandbox means anything there.
    """

    keeps_chown = False

    def __init__(self, uid: int, gid: int) -> None:
        """The ids that own the folder."""
        self._folder = (uid, gid)
        self._shown = (uid, gid)

    def shown(self, uid: int, gid: int) -> tuple[int, int]:
        owner, shown = self._folder, self._shown
        return (shown[0] if uid == owner[0] else NOBODY, shown[1] if gid == owner[1] else NOBODY)

    def creator(self, uid: int, gid: int) -> tuple[int, int]:
        return self._folder

    def give_root(self, uid: int | None, gid: int | None) -> None:
        before = self._shown
        self._shown = (before[0] if uid is None else uid, before[1] if gid is None else gid)


class Attributes:
    """Packs answers."""

    def __init__(self, caching: Caching, owners: Owners) -> None:
        self.caching = caching
        self.owners = owners
        self._maps = not owners.keeps_chown
        self._entry = _split(caching.entry_seconds)
        self._attribute = _split(caching.attribute_seconds)
        negative = _split(caching.negative_seconds)
        no_attributes = (0,) * 16
        self.negative = (
            abi.ENTRY_OUT.pack(0, 0, negative[0], 0, negative[1], 0, *no_attributes)
            if caching.negative_seconds
            else None
        )
        """The answer for a name that does not exist; None: an error, which is not remembered."""

    def entry(self, number: int, status: os.stat_result, *, cached: bool = True) -> bytes:
        """`fuse_entry_out`. Without `cached` the kernel asks again each time."""
        seconds, nanoseconds = self._entry if cached else (0, 0)
        valid, valid_nanoseconds = self._attribute if cached else (0, 0)
        mode, inode, _, links, uid, gid, size, atime, mtime, ctime = status
        if self._maps:
            uid, gid = self.owners.shown(uid, gid)
        return abi.ENTRY_OUT.pack(
            number, 0, seconds, valid, nanoseconds, valid_nanoseconds,
            inode, size, status.st_blocks, atime, mtime, ctime,
            status.st_atime_ns % _NANOSECONDS, status.st_mtime_ns % _NANOSECONDS, status.st_ctime_ns % _NANOSECONDS,
            mode, links, uid, gid, status.st_rdev & 0xFFFFFFFF, status.st_blksize, 0,
        )  # fmt: skip

    def attributes(self, status: os.stat_result, *, cached: bool = True, links: int | None = None) -> bytes:
        """`fuse_attr_out`. `links` instead of what the folder says."""
        valid, nanoseconds = self._attribute if cached else (0, 0)
        mode, inode, _, own_links, uid, gid, size, atime, mtime, ctime = status
        if self._maps:
            uid, gid = self.owners.shown(uid, gid)
        return abi.ATTR_OUT.pack(
            valid, nanoseconds, 0,
            inode, size, status.st_blocks, atime, mtime, ctime,
            status.st_atime_ns % _NANOSECONDS, status.st_mtime_ns % _NANOSECONDS, status.st_ctime_ns % _NANOSECONDS,
            mode, own_links if links is None else links, uid, gid,
            status.st_rdev & 0xFFFFFFFF, status.st_blksize, 0,
        )  # fmt: skip


def _split(seconds: float) -> tuple[int, int]:
    return int(seconds), int(seconds % 1 * _NANOSECONDS)
