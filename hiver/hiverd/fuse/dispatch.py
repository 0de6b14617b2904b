"""From a request's bytes to the bytes of its answer. No kernel is needed for this."""

from __future__ import annotations

import errno
import logging
import os
import struct
import sys
from collections.abc import Callable
from typing import Final

from hiverd.fuse import abi
from hiverd.fuse.attribute_ops import AttributeOperations
from hiverd.fuse.caller import Caller
from hiverd.fuse.core import NOTHING, Answer, Core
from hiverd.fuse.directory_ops import DirectoryOperations
from hiverd.fuse.file_ops import FileOperations
from hiverd.fuse.name_ops import NameOperations

_log = logging.getLogger(__name__)

Handler = Callable[[Caller, int, memoryview], Answer]
Buffers = tuple[bytes, bytes | memoryview]

_MAX_ERRNO: Final = 511
"""The kernel takes no larger one from us."""
_WANTED: Final = (
    abi.ASYNC_READ
    | abi.ATOMIC_O_TRUNC
    | abi.BIG_WRITES
    | abi.DO_READDIRPLUS
    | abi.READDIRPLUS_AUTO
    | abi.ASYNC_DIO
    | abi.PARALLEL_DIROPS
    | abi.MAX_PAGES
    | abi.CACHE_SYMLINKS
    | abi.INIT_EXT
)
_MAX_BACKGROUND: Final = 64
_CONGESTED: Final = 48
_UNANSWERED: Final = frozenset({abi.FORGET, abi.BATCH_FORGET})


class Dispatcher:
    """Answers requests. Safe to call from several threads, each with a `Caller` of its own."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._files = FileOperations(core)
        self._directories = DirectoryOperations(core)
        names = NameOperations(core)
        attributes = AttributeOperations(core, self._files)
        self._handlers: dict[int, Handler] = {
            abi.LOOKUP: names.lookup,
            abi.FORGET: names.forget,
            abi.BATCH_FORGET: names.batch_forget,
            abi.SYMLINK: names.symlink,
            abi.READLINK: names.read_link,
            abi.MKNOD: names.make_node,
            abi.MKDIR: names.make_directory,
            abi.UNLINK: names.unlink,
            abi.RMDIR: names.remove_directory,
            abi.RENAME: names.rename,
            abi.RENAME2: names.rename2,
            abi.LINK: names.link,
            abi.GETATTR: attributes.get,
            abi.SETATTR: attributes.set,
            abi.STATFS: attributes.statfs,
            abi.CREATE: self._files.create,
            abi.OPEN: self._files.open,
            abi.READ: self._files.read,
            abi.WRITE: self._files.write,
            abi.RELEASE: self._files.release,
            abi.FSYNC: self._files.fsync,
            abi.FALLOCATE: self._files.allocate,
            abi.LSEEK: self._files.seek,
            abi.COPY_FILE_RANGE: self._files.copy_range,
            abi.OPENDIR: self._directories.open,
            abi.READDIR: self._directories.read,
            abi.READDIRPLUS: self._directories.read_plus,
            abi.RELEASEDIR: self._directories.release,
            abi.FSYNCDIR: self._directories.sync,
            abi.INIT: self._init,
            abi.DESTROY: self._nothing,
            abi.IOCTL: self._no_ioctl,
        }
        self._logged: set[tuple[int, type[BaseException]]] = set()
        self.expires_entries = False
        """True: this kernel can be told to look names up again without forgetting who is in them."""

    def answer(self, caller: Caller, request: memoryview) -> Buffers | None:
        """Header and payload of the answer; None for what has no answer. Never raises."""
        try:
            length, operation, unique, number, caller.uid, caller.gid, caller.pid, _, _ = abi.IN_HEADER.unpack_from(
                request
            )
        except struct.error:
            return None
        handler = self._handlers.get(operation)
        if handler is None:
            # The kernel then stops asking: locks, extended attributes, FLUSH, INTERRUPT and so on.
            return abi.OUT_HEADER.pack(16, -errno.ENOSYS, unique), NOTHING
        try:
            if length != len(request):
                raise OSError(errno.EIO, f"a request of {len(request)} bytes says that it has {length}")
            payload = handler(caller, number, request[40:])
        except OSError as error:
            number_of_error = error.errno or errno.EIO
            payload = None if operation in _UNANSWERED else NOTHING
            error_code = -number_of_error if number_of_error <= _MAX_ERRNO else -errno.EIO
            return None if payload is None else (abi.OUT_HEADER.pack(16, error_code, unique), NOTHING)
        except Exception as error:  # noqa: BLE001 -- one bad request must not end the mount
            self._log_once(operation, error)
            return None if operation in _UNANSWERED else (abi.OUT_HEADER.pack(16, -errno.EIO, unique), NOTHING)
        finally:
            caller.since = 0
        if payload is None:
            return None
        return abi.OUT_HEADER.pack(16 + len(payload), 0, unique), payload

    def close(self) -> None:
        """When nothing is served any more: closes what the kernel had open."""
        self._files.close_all()
        self._directories.close_all()

    def _log_once(self, operation: int, error: Exception) -> None:
        key = (operation, type(error))
        if key not in self._logged:
            self._logged.add(key)
            _log.error("operation %d failed; further ones of this kind are not logged", operation, exc_info=error)

    def _init(self, caller: Caller, number: int, body: memoryview) -> Answer:
        major, minor, readahead, flags = abi.INIT_IN.unpack_from(body)
        if major < abi.MAJOR or (major == abi.MAJOR and minor < abi.OLDEST_MINOR):
            raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
        if major > abi.MAJOR:
            # It asks again, with our version.
            return abi.INIT_OUT.pack(abi.MAJOR, abi.MINOR, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        more = int.from_bytes(body[16:20], sys.byteorder) if flags & abi.INIT_EXT and len(body) >= 20 else 0
        self.expires_entries = bool(more & abi.HAS_EXPIRE_ONLY)
        wanted = _WANTED
        alone = self._core.attributes.caching.keep_pages and self._core.content is None
        wanted |= abi.EXPLICIT_INVAL_DATA if alone else abi.AUTO_INVAL_DATA
        return abi.INIT_OUT.pack(
            abi.MAJOR, min(minor, abi.MINOR), max(readahead, abi.MAX_REQUEST_BYTES), flags & wanted,
            _MAX_BACKGROUND, _CONGESTED, abi.MAX_REQUEST_BYTES, 1, abi.MAX_REQUEST_PAGES, 0, 0,
        )  # fmt: skip

    def _nothing(self, caller: Caller, number: int, body: memoryview) -> Answer:
        return NOTHING

    def _no_ioctl(self, caller: Caller, number: int, body: memoryview) -> Answer:
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
