"""Who asks: the thread that serves a request, and the header of that request."""

from __future__ import annotations

from hiverd.fuse import abi, syscalls


class Caller:
    """One per serving thread, used for one request after the other. Not shared between threads."""

    __slots__ = ("_acting_as", "gid", "pid", "since", "space", "turn", "uid")

    def __init__(self) -> None:
        self.uid = 0
        """File-system ids of the process that asks, as the host knows them."""
        self.gid = 0
        self.pid = 0
        """Its thread, as the host knows it; 0 if there is none, as for the pages of a mapping."""
        self.since = 0
        """As `hiverd.fuse.descriptors.Using` says."""
        self.turn = 0
        """Odd from when a request is read until the kernel has its answer."""
        self.space = memoryview(bytearray(abi.MAX_REQUEST_BYTES))
        """For the payload of an answer; overwritten by the next request."""
        self._acting_as: tuple[int, int] | None = None

    def create_as(self, uid: int, gid: int) -> None:
        """What this thread makes from now on belongs to these ids."""
        if self._acting_as != (uid, gid):
            syscalls.become(uid, gid)
            self._acting_as = (uid, gid)
