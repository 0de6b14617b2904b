"""One archive on the way to a place that fsspec reaches, and making what is there durable. All of it blocks."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import threading
from contextlib import suppress
from typing import Any, Final
from urllib.parse import urlsplit

from hiver_snapshots.pieces import suffix_of
from hiver_snapshots.urls import WITHOUT_FOLDERS
from hiverd.contracts.errors import UnavailableError

DATA: Final = "data-"
_PART_BYTES: Final = 8 << 20
_LIBRARIES: Final = ("aiobotocore", "botocore", "fsspec", "gcsfs", "google", "s3fs", "urllib3")
"""What they log of errors shows URLs that let anyone go on with an upload. Errors come to the caller in any case."""
_TRIES: Final = 100
"""For a folder that is removed, being empty, whenever it was made."""


def _file_system(scheme: str) -> Any:
    """The class for a scheme. Libraries come with extras; the URL was judged before."""
    if scheme in {"gs", "gcs"}:
        # What is registered asks by gRPC, past a configured endpoint, which kind of bucket it is. Objects suffice here.
        from gcsfs.core import GCSFileSystem  # noqa: PLC0415

        return GCSFileSystem
    from fsspec.registry import get_filesystem_class  # noqa: PLC0415

    return get_filesystem_class(scheme)


class Place:
    """A file system of fsspec's, and the folder in it that holds all snapshots."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self._scheme = urlsplit(url).scheme
        # An instance of our own that remembers no listing: other servers may write to the same place.
        for library in _LIBRARIES:
            logging.getLogger(library).setLevel(logging.CRITICAL)
        if self._scheme in {"gs", "gcs"}:
            options = {"access": "read_write", **options}
        self.files = _file_system(self._scheme)(skip_instance_cache=True, use_listings_cache=False, **options)
        self.root = str(self.files._strip_protocol(url)).rstrip("/")
        self._on_disk = self._scheme == "file"

    def names(self, folder: str = "") -> list[str]:
        """What is right below a folder; nothing for one that does not exist."""
        path = f"{self.root}/{folder}".rstrip("/")
        self.files.invalidate_cache()
        try:
            found = self.files.ls(path, detail=False)
        except FileNotFoundError:
            return []
        names = {str(name).rstrip("/").rpartition("/")[2] for name in found if str(name).rstrip("/") != path}
        return sorted(names - {""})

    def make_folder(self, folder: str) -> None:
        if self._on_disk:
            for path in (self.root, f"{self.root}/{folder}"):
                os.makedirs(path, mode=0o700, exist_ok=True)
        elif self._scheme not in WITHOUT_FOLDERS:
            self.files.makedirs(f"{self.root}/{folder}", exist_ok=True)

    def open_new(self, folder: str, name: str) -> Any:
        """For writing."""
        for left in reversed(range(_TRIES)):
            self.make_folder(folder)
            try:
                return self.files.open(f"{self.root}/{folder}/{name}", "wb", block_size=_PART_BYTES)
            except FileNotFoundError:
                if not left or not self._on_disk:
                    raise
        raise AssertionError  # the last try returns or raises

    def write_whole(self, path: str, content: bytes) -> None:
        """A small file."""
        self.files.pipe_file(f"{self.root}/{path}", content)
        with suppress(FileNotFoundError):  # it was deleted as soon as it was seen
            self.make_durable(path)

    def make_durable(self, path: str) -> None:
        """A service's answer says that it has it; our own disk has to be told."""
        if not self._on_disk:
            return
        full = f"{self.root}/{path}"
        os.chmod(full, 0o600)
        for name in (full, os.path.dirname(full), self.root):
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def remove(self, path: str) -> None:
        """A missing one is a success."""
        with suppress(FileNotFoundError):
            self.files.rm_file(f"{self.root}/{path}")

    def remove_folder_if_empty(self, folder: str) -> None:
        if self._on_disk:
            with suppress(OSError):
                os.rmdir(f"{self.root}/{folder}")


class Upload:
    """Under a name that nobody looks for until a marker names it. May be discarded at any time, also by another
    thread."""

    def __init__(self, place: Place, folder: str, instance: str) -> None:
        self.size = 0
        self._place = place
        self._folder = folder
        self._name = f"{DATA}{instance}-{secrets.token_hex(8)}"
        self._digest = hashlib.sha256()
        self._lock = threading.Lock()
        self._file: Any = None
        self._ended = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, block: bytes) -> None:
        with self._lock:
            if self._ended:
                return
            if self._file is None:
                self._open(block)
            self._digest.update(block)
            self.size += len(block)
            self._file.write(block)

    def _open(self, head: bytes) -> None:
        self._name += suffix_of(head)
        self._file = self._place.open_new(self._folder, self._name)

    def finish(self) -> None:
        """It is there, whole and durable. Raises if the service has something else."""
        with self._lock:
            if self._ended:
                raise UnavailableError("the upload was discarded")
            if self._file is None:
                self._open(b"")
            self._file.close()
            path = f"{self._folder}/{self._name}"
            self._place.make_durable(path)
            self._place.files.invalidate_cache()
            if self._place.files.info(f"{self._place.root}/{path}")["size"] != self.size:
                raise UnavailableError("the snapshot store has only a part of what it was sent")

    def keep(self) -> None:
        """From now on nothing is discarded."""
        with self._lock:
            self._ended = True

    def discard(self) -> None:
        """What is not kept goes, as far as the service lets us; the next start tries again. Idempotent."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            if self._file is None:
                return
            with suppress(Exception):
                _abort(self._file)
            with suppress(Exception):
                self._place.remove(f"{self._folder}/{self._name}")
            self._place.remove_folder_if_empty(self._folder)


def _abort(file: Any) -> None:
    """Closing would complete the upload of a half: where a file can be discarded, it must not be closed."""
    if file.closed:
        return
    from fsspec.spec import AbstractBufferedFile  # noqa: PLC0415 -- comes with an extra

    if not isinstance(file, AbstractBufferedFile):
        file.close()
        return
    try:
        file.discard()
    finally:
        file.closed = True
