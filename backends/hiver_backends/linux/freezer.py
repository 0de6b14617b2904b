"""The freezer of one control group, in both versions."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct


class Freezer(Struct, frozen=True):
    """Of one group. All calls are quick; they raise `OSError` once the group is gone."""

    switch: Path
    frozen_word: str
    thawed_word: str
    report: Path
    frozen_report: str

    def freeze(self) -> None:
        """Begins to; see `is_frozen`."""
        self.switch.write_text(self.frozen_word)

    def thaw(self) -> None:
        self.switch.write_text(self.thawed_word)

    def is_frozen(self) -> bool:
        return self.frozen_report in self.report.read_text().splitlines()


def freezer_of(group: Path) -> Freezer | None:
    """None: this group's hierarchy has none."""
    if (group / "cgroup.freeze").exists():
        return Freezer(group / "cgroup.freeze", "1", "0", group / "cgroup.events", "frozen 1")
    if (group / "freezer.state").exists():
        return Freezer(group / "freezer.state", "FROZEN", "THAWED", group / "freezer.state", "FROZEN")
    return None
