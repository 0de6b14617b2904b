"""User namespaces that serve only as id maps for mounts (mount_setattr(2), MOUNT_ATTR_IDMAP)."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from . import syscalls

SUBORDINATE_IDS: Final = 65536
"""Ids in one sandbox's range."""


class IdMap(NamedTuple):
    """`length` ids from `uid`/`gid` on disk appear as those from `host_uid`/`host_gid` on."""

    uid: int
    gid: int
    host_uid: int
    host_gid: int
    length: int


def for_sandbox(host_id: int) -> IdMap:
    """The map that makes an image's files (owned by 0...) the property of a sandbox's root."""
    return IdMap(0, 0, host_id, host_id, SUBORDINATE_IDS)


def for_owner(uid: int, gid: int, host_id: int) -> IdMap:
    """The map that makes one host user's files the property of a sandbox's root, and no one else's."""
    return IdMap(uid, gid, host_id, host_id, 1)


class UserNamespaces:
    """Makes and keeps namespace descriptors, the newest `capacity` of them. Blocking; safe in threads."""

    def __init__(self, capacity: int = 128) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._descriptors: OrderedDict[IdMap, int] = OrderedDict()

    @contextlib.contextmanager
    def borrow(self, ids: IdMap) -> Iterator[int]:
        """A descriptor of the caller's own, closed on leaving."""
        descriptor = self._cached_copy(ids)
        if descriptor is None:
            descriptor = _make(ids)
            self._keep(ids, os.dup(descriptor))
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Frees all descriptors."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def _cached_copy(self, ids: IdMap) -> int | None:
        with self._lock:
            kept = self._descriptors.get(ids)
            if kept is None:
                return None
            self._descriptors.move_to_end(ids)
            return os.dup(kept)

    def _keep(self, ids: IdMap, descriptor: int) -> None:
        with self._lock:
            previous = self._descriptors.pop(ids, None)
            self._descriptors[ids] = descriptor
            evicted = [] if previous is None else [previous]
            if len(self._descriptors) > self._capacity:
                evicted.append(self._descriptors.popitem(last=False)[1])
        for old in evicted:
            os.close(old)


def _make(ids: IdMap) -> int:
    # A threaded process may not unshare its own user namespace, so a child makes one: it ends at once, and the
    # namespace is taken from what is left of it until it is reaped.
    pid = syscalls.clone_ended(syscalls.CLONE_NEWUSER)
    try:
        process = Path("/proc", str(pid))
        (process / "uid_map").write_text(f"{ids.uid} {ids.host_uid} {ids.length}\n")
        (process / "gid_map").write_text(f"{ids.gid} {ids.host_gid} {ids.length}\n")
        return os.open(process / "ns" / "user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.waitpid(pid, 0)
