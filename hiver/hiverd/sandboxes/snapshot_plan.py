"""What a configuration says about snapshots (PROTOCOL 3.16, 4.3), and which folders a capture is made of. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from hiverd.contracts.isolation import Mount, RootChanges
from hiverd.sandboxes import trust
from hiverd.snapshots.capture import Part
from hiverd.snapshots.selection import Selection
from hiverd.wire.config import Snapshot, SnapshotFiles

EXCLUDED: Final = (
    "/etc/hosts",
    "/etc/hostname",
    "/etc/resolv.conf",
    trust.STAND_ALONE,
    trust.BUNDLE,
    *trust.OTHER_BUNDLES,
    *trust.JAVA_STORES,
    f"/root/{trust.NSS_FOLDER}",
)
"""A sandbox's own identity, and whom it trusts: made anew for every sandbox, so neither captured nor restored."""


class FilesPlan(Struct, frozen=True):
    """A capture or a restore that a configuration or a request asks for."""

    key: str
    include: tuple[str, ...] = ()
    mount: str | None = None
    """The mount that keeps it; None: the operator's store."""


def restore_of(snapshot: Snapshot | None) -> FilesPlan | None:
    """What a new sandbox begins with, if there is such a snapshot."""
    if snapshot is None:
        return None
    if snapshot.files is not None:
        return plan_of(snapshot.files)
    if snapshot.restore_key is not None:
        return FilesPlan(snapshot.restore_key, snapshot.include or ())
    return None


def capture_at_end_of(snapshot: Snapshot | None) -> FilesPlan | None:
    """What is captured when a sandbox ends: in the old form always, in the new one with `write_on_shutdown`."""
    if snapshot is None:
        return None
    if snapshot.files is not None:
        return plan_of(snapshot.files) if snapshot.files.write_on_shutdown else None
    key = snapshot.write_key or snapshot.restore_key
    return None if key is None else FilesPlan(key, snapshot.include or ())


def plan_of(files: SnapshotFiles) -> FilesPlan:
    return FilesPlan(files.key, files.include or (), files.mount)


def parts_of(changes: RootChanges, mounts: Sequence[Mount], include: Sequence[str]) -> list[Part]:
    """Without patterns mounts are left out; with them they are looked into where a pattern leads there."""
    places = {mount.target.strip("/"): mount for mount in mounts}
    root = Part(
        place="",
        folder=changes.upper,
        overlay=True,
        first_id=changes.first_id,
        id_count=changes.id_count,
        covered=tuple(places),
    )
    if not include:
        return [root]
    bases = Selection(include).bases
    return [
        root,
        *(
            Part(
                place=place,
                folder=mount.source,
                first_id=changes.first_id,
                id_count=changes.id_count,
                covered=tuple(other for other in places if other.startswith(f"{place}/")),
            )
            for place, mount in places.items()
            if any(_meet(place.encode("utf-8", "surrogateescape"), base) for base in bases)
        ),
    ]


def _meet(place: bytes, base: bytes) -> bool:
    """Whether one is at or below the other."""
    return not base or place == base or place.startswith(base + b"/") or base.startswith(place + b"/")
