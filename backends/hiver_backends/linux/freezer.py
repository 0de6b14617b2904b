"""The freezer of one control group, in both versions."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from msgspec import Struct

_LONGEST_WAIT_SECONDS: Final = 0.005


class Freezer(Struct, frozen=True):
    """Of one group. Its calls raise `OSError` once the group is gone."""

    group: Path
    unified: bool
    """Version 2, which also freezes what waits for a file system."""

    def settles(self, seconds: float) -> bool:
        """Whether nothing in the group runs after at most so many seconds. Blocking."""
        self._switch(frozen=True)
        deadline_monotonic = time.monotonic() + seconds
        delay_seconds = 0.0002
        while not self._is_frozen():
            if time.monotonic() > deadline_monotonic:
                return False
            time.sleep(delay_seconds)
            delay_seconds = min(2 * delay_seconds, _LONGEST_WAIT_SECONDS)
        return True

    def thaw(self) -> None:
        self._switch(frozen=False)

    def is_populated(self) -> bool:
        """Whether the sandbox's processes are in this group: on hosts with both versions they need not be."""
        return bool((self.group / "cgroup.procs").read_text())

    def _switch(self, *, frozen: bool) -> None:
        if self.unified:
            (self.group / "cgroup.freeze").write_text(str(int(frozen)))
        else:
            (self.group / "freezer.state").write_text("FROZEN" if frozen else "THAWED")

    def _is_frozen(self) -> bool:
        if self.unified:
            return "frozen 1" in (self.group / "cgroup.events").read_text().splitlines()
        return (self.group / "freezer.state").read_text().strip() == "FROZEN"


def freezer_of(group: Path) -> Freezer | None:
    """None: this group's hierarchy has none."""
    if (group / "cgroup.freeze").exists():
        return Freezer(group, unified=True)
    if (group / "freezer.state").exists():
        return Freezer(group, unified=False)
    return None
