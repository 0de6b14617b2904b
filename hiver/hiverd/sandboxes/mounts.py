"""Which mounts a configuration asks for, and whether this server can give them. What it cannot is refused, by name."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from hiverd.contracts.errors import UnsupportedError
from hiverd.contracts.isolation import Mount
from hiverd.sandboxes.origins import resolve_origin
from hiverd.wire.config import FileSystem, LocalFileSystem, SandboxConfig


class PlannedMount(Struct, frozen=True):
    target: str
    origin: str | None
    """A folder of the operator's; None: a new folder on the sandbox's volume."""


class MountPlanner:
    """Local mounts with full access are kernel mounts (DESIGN 3); everything else is not supported yet."""

    def __init__(self, origin_roots: Sequence[Path]) -> None:
        self._origin_roots = tuple(origin_roots)

    def plan(self, config: SandboxConfig) -> list[PlannedMount]:
        """Raises `UnsupportedError` naming the member that asks for too much. Creates nothing."""
        if config.snapshot:
            raise UnsupportedError("snapshot: snapshots are not supported by this server yet", field="snapshot")
        return [self._plan_one(index, fs) for index, fs in enumerate(config.fs or ())]

    def _plan_one(self, index: int, fs: FileSystem) -> PlannedMount:
        if not isinstance(fs, LocalFileSystem):
            raise UnsupportedError(
                f'fs[{index}].backend: "{fs.backend}" is not supported by this server yet; use "local"',
                field=f"fs[{index}].backend",
            )
        if fs.internal:
            raise UnsupportedError(
                f"fs[{index}].internal: internal mounts are not supported by this server yet",
                field=f"fs[{index}].internal",
            )
        self._require_full_access(index, fs)
        if fs.origin is None:
            return PlannedMount(fs.mount, None)
        return PlannedMount(fs.mount, str(resolve_origin(fs.origin, self._origin_roots, field=f"fs[{index}].origin")))

    def _require_full_access(self, index: int, fs: FileSystem) -> None:
        whole = {"/**", f"{fs.mount.rstrip('/')}/**"}
        rules = fs.acls or ()
        if rules and not (all(rule.access == "rw" for rule in rules) and any(rule.path in whole for rule in rules)):
            raise UnsupportedError(
                f'fs[{index}].acls: only full access is supported by this server yet: {{"path": "{fs.mount}/**",'
                ' "access": "rw"}',
                field=f"fs[{index}].acls",
            )

    def prepare(self, planned: PlannedMount, volume: Path) -> Mount:
        """Makes the folder behind a mount. Blocking; idempotent."""
        if planned.origin is not None:
            return Mount(target=planned.target, source=planned.origin, owned=False)
        source = volume / "mounts" / _folder_name(planned.target)
        source.parent.mkdir(mode=0o700, exist_ok=True)
        source.mkdir(mode=0o755, exist_ok=True)
        os.chmod(source, 0o755)  # noqa: S103 -- below a 0700 folder; the umask must not decide
        return Mount(target=planned.target, source=str(source))


def changed_mounts(
    current: Sequence[PlannedMount], desired: Sequence[PlannedMount]
) -> tuple[list[PlannedMount], list[PlannedMount]]:
    """(to add, to remove): a mount whose origin differs is in both."""
    return [m for m in desired if m not in current], [m for m in current if m not in desired]


def _folder_name(target: str) -> str:
    """A folder name for a mount path, reversible, so that two paths never share a folder."""
    return re.sub(r"[^A-Za-z0-9.-]", lambda match: f"_{ord(match[0]):x}_", target.strip("/")) or "_root_"
