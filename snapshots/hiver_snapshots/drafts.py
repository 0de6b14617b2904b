"""One archive on the way into a folder: invisible until it is whole. All of it blocks: for worker threads.

A draft is a hidden file that its writer holds locked. The lock ends with the process, however that ends: so a draft
that can be locked is a dead writer's.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from hiver_snapshots.pieces import suffix_of

_DRAFT: Final = ".writing-"
_TRIES: Final = 100


class Draft:
    """May be discarded at any time, also while another thread is writing: one waits for the other."""

    def __init__(self, folder: Path) -> None:
        """`folder`: of one key; made if it is missing."""
        self.size = 0
        self.suffix = suffix_of(b"")
        self._folder = folder
        self._digest = hashlib.sha256()
        self._lock = threading.Lock()
        self._path: Path | None = None
        self._fd: int | None = None
        self._ended = False

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def open(self) -> None:
        with self._lock:
            if self._ended:
                return
            for _ in range(_TRIES):
                if self._try_to_open():
                    return
        raise OSError(f"{self._folder} goes away again and again")

    def _try_to_open(self) -> bool:
        """False if a sweep or a delete was faster."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        path = self._folder / f"{_DRAFT}{secrets.token_hex(8)}"
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            return False
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink == 0:
            os.close(fd)
            return False
        self._path, self._fd = path, fd
        return True

    def write(self, block: bytes) -> None:
        with self._lock:
            if self._fd is None:
                return  # discarded meanwhile
            if self.size == 0:
                self.suffix = suffix_of(block)
            self._digest.update(block)
            self.size += len(block)
            left = memoryview(block)
            while left:
                left = left[os.write(self._fd, left) :]

    def publish(self, name: Callable[[], str]) -> str:
        """Durable and visible under `name()`, which is asked at the last moment; returns it."""
        with self._lock:
            if self._fd is None or self._path is None:
                raise FileNotFoundError("the draft was discarded")
            os.fsync(self._fd)
            final = name()
            self._path.rename(self._folder / final)
            self._path = None
            sync_folder(self._folder)
            sync_folder(self._folder.parent)
            return final

    def discard(self) -> None:
        """What is not published goes. Idempotent."""
        with self._lock:
            self._ended = True
            if self._path is not None:
                with suppress(OSError):
                    self._path.unlink(missing_ok=True)
                with suppress(OSError):
                    self._folder.rmdir()
            if self._fd is not None:
                os.close(self._fd)
            self._path = self._fd = None


def sweep(folder: Path) -> None:
    """Removes the drafts of dead writers from the folder of one key, and the folder if nothing else is in it."""
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            if path.name.startswith(_DRAFT):
                _remove_if_dead(path)
        with suppress(OSError):
            folder.rmdir()


def _remove_if_dead(path: Path) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except OSError:
        return  # somebody is writing it
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Makes names durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
