"""What was accessed and is not on record yet: bounded, and coarser rather than silent when there is too much."""

from __future__ import annotations

import threading
from typing import Final, NamedTuple

from hiverd.wire.events import FileOperation

FINE_BYTES: Final = 8 << 20
"""Of one sandbox; from here on accesses are told by their directory (`/workspace/made/*`)."""
COARSE_BYTES: Final = 10 << 20
"""From here on by their mount alone (`/workspace/**`): a mount has three such pairs, so this is the bound."""
TOTAL_BYTES: Final = 64 << 20
"""Of all sandboxes together; above it everything is told by its mount."""
PAIR_BYTES: Final = 250
"""What a pair takes beside its path."""

ALL_OPERATIONS: Final[tuple[FileOperation, ...]] = ("read", "write", "delete")


class Place(NamedTuple):
    """A directory of a mount."""

    mount: str
    """As configured."""
    target: bytes
    """The mount's path, as events show it."""
    path: bytes
    """Of the directory, as the agent sees it."""
    prefix: bytes
    """What stands before the names in it."""
    known: bool = True
    """False: the directory was gone before anybody looked, and `path` is the mount's."""

    @classmethod
    def at(cls, mount: str, target: bytes, path: bytes, *, known: bool = True) -> Place:
        return cls(mount, target, path, path.rstrip(b"/") + b"/", known)


class Access(NamedTuple):
    """One pair of events to be: `path` as the agent sees it."""

    operation: FileOperation
    mount: str
    path: bytes


class Budget:
    """What the pending accesses of all sandboxes take together."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.used_bytes = 0


class Pending:
    """The accesses of one sandbox: filled by the thread that reads, emptied by the event loop."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._waiting: dict[Access, None] = {}
        self._held_bytes = 0
        self._coarse = 0

    def add(self, operation: FileOperation, place: Place, name: bytes) -> None:
        """An access of `name` in a directory; of the directory itself if `name` is `.` or unknown."""
        path = place.path if name in {b".", b""} else place.prefix + name
        with self._budget.lock:
            if self._held_bytes >= FINE_BYTES or self._budget.used_bytes >= TOTAL_BYTES:
                coarse = self._held_bytes >= COARSE_BYTES or self._budget.used_bytes >= TOTAL_BYTES
                path = _joined(place.target, b"**") if coarse else place.prefix + b"*"
                self._coarse += 1
            self._put(Access(operation, place.mount, path))

    def add_unknown(self, mounts: dict[bytes, str], count: int) -> None:
        """`count` accesses that nobody looked at: anything may have happened anywhere. `mounts`: name by target."""
        with self._budget.lock:
            self._coarse += count
            for target, mount in mounts.items():
                for operation in ALL_OPERATIONS:
                    self._put(Access(operation, mount, _joined(target, b"**")))

    def _put(self, access: Access) -> None:
        if access not in self._waiting:
            self._waiting[access] = None
            self._count(len(access.path) + PAIR_BYTES)

    def _count(self, size: int) -> None:
        self._held_bytes += size
        self._budget.used_bytes += size

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self) -> list[Access]:
        """All that waits; it counts until `told`."""
        with self._budget.lock:
            taken, self._waiting = self._waiting, {}
        return list(taken)

    def told(self, accesses: list[Access]) -> None:
        """They are with the journal, which has bounds of its own."""
        with self._budget.lock:
            self._count(-sum(len(access.path) + PAIR_BYTES for access in accesses))

    def take_coarse(self) -> int:
        """How many accesses were told by a directory or mount since the last call."""
        with self._budget.lock:
            count, self._coarse = self._coarse, 0
        return count


def _joined(directory: bytes, name: bytes) -> bytes:
    return directory.rstrip(b"/") + b"/" + name
