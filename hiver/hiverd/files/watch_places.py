"""Where a directory is that an event names by a handle: which mount, and which path the agent sees."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Final

from hiverd.files import handles
from hiverd.files.watch_pairs import Place

CACHED_PLACES: Final = 4096
_CACHED_PATH_BYTES: Final = 512
"""Longer paths are looked up each time, so that the cache of a sandbox stays below a few MiB."""
_GONE_DEPTH: Final = 256

Gone = Mapping[bytes, tuple[bytes, bytes]]
"""By the handle of a removed directory: the handle of the one that held it, and its name there."""


Folders = Mapping[bytes, tuple[str, bytes]]
"""The folders `mounts/<name>` of a volume whose accesses are told: the mount as configured and as bytes, by name."""


class Places:
    """Of one volume. Used by the thread that reads, and by no other."""

    def __init__(self, folder: bytes, mount_fd: int, folders: Folders) -> None:
        """`folder`: `mounts` of the volume, its real path. `mount_fd`: open on the volume."""
        self._prefix = folder + b"/"
        self._mount_fd = mount_fd
        self._folders = folders
        self._cache: dict[bytes, Place | None] = {}

    def change(self, folders: Folders) -> None:
        """Other mounts from now on."""
        self._folders = folders
        self._cache = {}

    def of(self, handle: bytes, gone: Callable[[], Gone]) -> Place | None:
        """None for what is in no mount. `gone` is asked only for a directory that cannot be found any more."""
        try:
            return self._cache[handle]
        except KeyError:
            pass
        path = self._path_of(handle)
        place = self._removed_place(handle, gone()) if path is None else self._place_of(path)
        if place is None or place.known:
            self._keep(handle, place)
        return place

    def _path_of(self, handle: bytes) -> bytes | None:
        """The host's path; None for what is gone."""
        try:
            fd = handles.open_path(self._mount_fd, handle)
        except OSError:
            return None
        try:
            if os.fstat(fd).st_nlink == 0:  # its path would bear a remark
                return None
            return os.readlink(b"/proc/self/fd/%d" % fd)
        except OSError:  # longer than the kernel can tell
            return None
        finally:
            os.close(fd)

    def _place_of(self, path: bytes) -> Place | None:
        if not path.startswith(self._prefix):
            return None
        folder, _, below = path[len(self._prefix) :].partition(b"/")
        found = self._folders.get(folder)
        if found is None:
            return None
        mount, target = found
        return Place.at(mount, target, target.rstrip(b"/") + b"/" + below if below else target)

    def _removed_place(self, handle: bytes, gone: Gone) -> Place | None:
        names: list[bytes] = []
        while handle in gone and len(names) < _GONE_DEPTH:
            handle, name = gone[handle]
            names.append(name)
            cached = self._cache.get(handle, ...)
            if cached is None:
                return None
            if cached is not ...:
                return _below(cached, names)
            path = self._path_of(handle)
            if path is not None:
                place = self._place_of(path)
                return place and _below(place, names)
        return self._best_known()

    def _best_known(self) -> Place | None:
        """A directory that is gone, and where it was has not been told either."""
        if not self._folders:
            return None
        mount, target = next(iter(self._folders.values()))
        return Place.at(mount, target, target, known=False)

    def learn(self, handle: bytes, directory: bytes, name: bytes) -> None:
        """A directory was made, which may be gone when something is heard of it next."""
        parent = self._cache.get(directory, ...)
        if parent is None:
            self._keep(handle, None)
        elif parent is not ...:
            self._keep(handle, _below(parent, [name]))

    def forget(self) -> None:
        """A directory has moved, and all that is below it."""
        self._cache = {}

    def _keep(self, handle: bytes, place: Place | None) -> None:
        if place is not None and len(place.path) > _CACHED_PATH_BYTES:
            return
        if len(self._cache) >= CACHED_PLACES:
            for oldest in list(islice(self._cache, CACHED_PLACES // 8)):
                del self._cache[oldest]
        self._cache[handle] = place

    def is_link(self, handle: bytes) -> bool:
        """Whether a new entry is a link of either kind; True also where that cannot be found out any more."""
        if not handle:
            return True
        try:
            fd = handles.open_path(self._mount_fd, handle)
        except OSError:
            return True
        try:
            found = os.fstat(fd)
        finally:
            os.close(fd)
        return stat.S_ISLNK(found.st_mode) or found.st_nlink != 1


def _below(place: Place, names: list[bytes]) -> Place:
    """`names`: the innermost first."""
    return Place.at(place.mount, place.target, place.prefix + b"/".join(reversed(names)))
