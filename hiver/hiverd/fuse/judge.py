"""Verdicts on requests, and the records of them (PROTOCOL 6.2, 6.3)."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import Final, Literal

from msgspec import Struct

from hiverd.files.acl import Access
from hiverd.fuse.caller import Caller

Operation = Literal["read", "write", "delete"]


class FsAccess(Struct, frozen=True, array_like=True, gc=False):
    """One access as it is told: an `fs.request` and its `fs.response`."""

    access: Literal["allowed", "denied"]
    path: str
    """Relative to the mount (`/a/b`), odd bytes as surrogates."""
    operation: Operation
    duration_seconds: float
    error: str | None
    """Of an allowed access that failed."""


Record = Callable[[FsAccess], None]
Exempt = Callable[[int], bool]


class ServerProcess:
    """Says whether a thread belongs to the server (`Exempt`), which is another process after a restart.

    Nothing in a sandbox can pretend it: the kernel fills in the caller's thread, as the host numbers it.
    """

    def __init__(self, pid: int | None = None) -> None:
        self.pid = pid
        """None: there is no server."""

    def __call__(self, pid: int) -> bool:
        server = self.pid
        return server is not None and pid > 0 and (pid == server or os.access(f"/proc/{server}/task/{pid}", os.F_OK))


class Judge:
    """Refuses, and tells. `record` None: nothing is told, and nothing is spent on it."""

    def __init__(self, record: Record | None, exempt: Exempt) -> None:
        self.record = record
        self._exempt: Final = exempt

    def is_exempt(self, caller: Caller) -> bool:
        return self._exempt(caller.pid)

    def refuse(self, path: str, operation: Operation | None, number: int) -> OSError:
        """The error for the workload, after the attempt has been told (but for an operation of None)."""
        if self.record is not None and operation is not None:
            self.record(FsAccess("denied", path, operation, 0.0, None))
        return OSError(number, os.strerror(number))

    def must_see(self, caller: Caller, access: Access, path: str, operation: Operation | None = "read") -> bool:
        """Raises `ENOENT` for what is denied. True: it is denied, but the server asks, so nothing may be cached."""
        if access != "deny":
            return False
        if self._exempt(caller.pid):
            return True
        raise self.refuse(path, operation, errno.ENOENT)

    def must_change(
        self, caller: Caller, access: Access, path: str, operation: Operation | None, *, denied: int = errno.ENOENT
    ) -> bool:
        """Raises `EROFS` for what is read-only, `denied` for what is denied. True: only the server may."""
        if access == "rw":
            return False
        if self._exempt(caller.pid):
            return True
        raise self.refuse(path, operation, errno.EROFS if access == "ro" else denied)

    def tell(self, caller: Caller, path: str, operation: Operation, began: float, error: OSError | None = None) -> None:
        """Of an allowed access; the server's own are not told. `began` by `time.perf_counter`."""
        if self.record is not None and not self._exempt(caller.pid):
            self.record_allowed(path, operation, began, error)

    def record_allowed(self, path: str, operation: Operation, began: float, error: OSError | None = None) -> None:
        """As `tell`, when it is known that the server is not the one who asks."""
        if self.record is not None:
            text = None if error is None else error.strerror or str(error)
            self.record(FsAccess("allowed", path, operation, time.perf_counter() - began, text))
