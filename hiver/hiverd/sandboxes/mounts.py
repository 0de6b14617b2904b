"""Which mounts a configuration asks for and of which kind each is (docs/files.md). What cannot be given is refused."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal

from msgspec import Struct

from hiverd import plugins
from hiverd.contracts.errors import HiverError, InvalidError, UnsupportedError
from hiverd.contracts.isolation import Mount
from hiverd.files.acl import Rules
from hiverd.sandboxes.origins import resolve_origin
from hiverd.strict import to_builtins
from hiverd.wire.config import AclRule, AnyFileSystem, LocalFileSystem, SandboxConfig
from hiverd.wire.environment import with_environment
from hiverd.wire.redaction import SECRET_MEMBERS, without_user_info

Kind = Literal["native", "governed", "internal"]

_NOT_DATA: Final = SECRET_MEMBERS | {"acls", "async", "internal", "mount"}
"""Members that do not say which data a mount shows."""


class PlannedMount(Struct, frozen=True):
    """One entry of `fs`, judged."""

    field: str
    """Its place, as in `fs[0]`."""
    target: str
    kind: Kind
    backend: str
    entry: dict[str, Any]
    """The whole entry with the operator's environment filled in. Holds credentials."""
    rules: tuple[AclRule, ...]
    origin: str | None = None
    """A folder of the operator's; None: local data are on the sandbox's volume."""

    @property
    def remote(self) -> bool:
        return self.backend != "local"

    @property
    def data(self) -> tuple[str, str | None, str]:
        """Two mounts of equal data differ in rules and credentials only."""
        told = {name: value for name, value in self.entry.items() if name not in _NOT_DATA}
        if "host" in told:
            told["host"] = without_user_info(str(told["host"]))
        return self.backend, self.origin, repr(sorted(told.items()))


class MountPlanner:
    """Local mounts on the sandbox's own volume with full access are the kernel's; everything else is governed."""

    def __init__(
        self,
        origin_roots: Sequence[Path],
        environ: Mapping[str, str] | None = None,
        fuse: Callable[[], bool] = lambda: os.path.exists("/dev/fuse"),
        watchable: Callable[[], bool] = lambda: True,
    ) -> None:
        """`fuse`: whether this host can have governed mounts. `watchable`: whether the kernel tells about accesses to
        native ones; if not, those whose accesses are asked for are governed."""
        self._origin_roots = tuple(origin_roots)
        self._environ = os.environ if environ is None else environ
        self._fuse = fuse
        self._watchable = watchable
        self._imported: set[str] = set()

    async def judge(self, config: SandboxConfig) -> list[PlannedMount]:
        """As `plan`, for a configuration that is not in force yet: the plug-ins have to take it, too. Those that it is
        the first to name are imported without making others wait."""
        names = {entry.backend for entry in config.fs or () if not isinstance(entry, LocalFileSystem)}
        for name in names - self._imported:
            with suppress(HiverError):  # told below, with the field
                await asyncio.to_thread(plugins.file_system_class, name)
                self._imported.add(name)
        plans = self.plan(config)
        for plan in plans:
            if plan.remote:
                _require_plugin(plan)
        return plans

    def plan(self, config: SandboxConfig) -> list[PlannedMount]:
        """Raises `UnsupportedError` or `InvalidError` naming the member that asks for too much. Creates nothing."""
        watched = config.events is None or not {"fs.request", "fs.response"}.isdisjoint(config.events)
        entries = with_environment(config, self._environ).fs or ()
        return [self._plan_one(f"fs[{index}]", entry, watched) for index, entry in enumerate(entries)]

    def plan_mount(self, config: SandboxConfig, target: str) -> PlannedMount | None:
        """As `plan`, of one mount: what is wrong with another does not matter. None: there is none of that path."""
        for index, entry in enumerate(with_environment(config, self._environ).fs or ()):
            if entry.mount == target:
                return self._plan_one(f"fs[{index}]", entry, watched=False)
        return None

    def _plan_one(self, field: str, entry: AnyFileSystem, watched: bool) -> PlannedMount:
        origin = None
        if isinstance(entry, LocalFileSystem) and entry.origin is not None:
            origin = str(resolve_origin(entry.origin, self._origin_roots, field=f"{field}.origin"))
        kind = self._kind(entry, watched)
        if kind == "governed" and not self._fuse():
            raise UnsupportedError(
                f"{field}: rules and remote backends need /dev/fuse, which this host does not have: modprobe fuse",
                field=field,
            )
        return PlannedMount(field, entry.mount, kind, entry.backend, to_builtins(entry), entry.acls or (), origin)

    def _kind(self, entry: AnyFileSystem, watched: bool) -> Kind:
        if entry.internal:
            return "internal"
        own = isinstance(entry, LocalFileSystem) and entry.origin is None
        open_to_all = own and Rules(entry.acls or (), entry.mount).fully_open
        return "native" if open_to_all and (not watched or self._watchable()) else "governed"

    def prepare(self, planned: PlannedMount, volume: Path) -> Mount:
        """Makes the folder behind a local mount. Blocking; idempotent."""
        if planned.origin is not None:
            return Mount(target=planned.target, source=planned.origin, owned=False)
        source = volume / "mounts" / folder_name(planned.target)
        source.parent.mkdir(mode=0o700, exist_ok=True)
        source.mkdir(mode=0o755, exist_ok=True)
        os.chmod(source, 0o755)  # noqa: S103 -- below a 0700 folder; the umask must not decide
        return Mount(target=planned.target, source=str(source))


def _require_plugin(plan: PlannedMount) -> None:
    plugin = plugins.file_system_class(plan.backend, field=f"{plan.field}.backend")
    try:
        plugins.build(plugin, plan.entry)
    except UnsupportedError as error:
        raise UnsupportedError(f"{plan.field}.backend: {error.message}", field=f"{plan.field}.backend") from error
    except InvalidError as error:
        member = f"{plan.field}.{error.field}" if error.field else plan.field
        raise InvalidError(f"{member}: {error.message}", field=member) from error


class MountChanges(Struct, frozen=True):
    """From the mounts in force to those wanted. What stays as it is, is in none of these."""

    removed: tuple[PlannedMount, ...]
    added: tuple[PlannedMount, ...]
    governed_anew: tuple[tuple[PlannedMount, PlannedMount], ...]
    """(before, after): the same data under other rules or with other credentials, changed where it is served."""


def changes_between(current: Sequence[PlannedMount], desired: Sequence[PlannedMount]) -> MountChanges:
    """A mount that must be made again is in both `removed` and `added`. The place in the list means nothing."""
    before = {mount.target: mount for mount in current}
    after = {mount.target: mount for mount in desired}
    live = [
        (before[target], mount)
        for target, mount in after.items()
        if target in before and not _is_same(before[target], mount) and _can_change(before[target], mount)
    ]
    settled = {mount.target for _, mount in live}
    settled |= {target for target, mount in after.items() if target in before and _is_same(before[target], mount)}
    return MountChanges(
        removed=tuple(mount for target, mount in before.items() if target not in settled),
        added=tuple(mount for target, mount in after.items() if target not in settled),
        governed_anew=tuple(live),
    )


def _is_same(a: PlannedMount, b: PlannedMount) -> bool:
    if a.kind == b.kind == "native":
        return a.data == b.data  # the same access in other words
    return (a.kind, a.entry, a.rules, a.origin) == (b.kind, b.entry, b.rules, b.origin)


def _can_change(a: PlannedMount, b: PlannedMount) -> bool:
    if a.kind == b.kind == "governed":
        return a.data == b.data and a.entry.get("async") == b.entry.get("async")
    return a.kind == b.kind == "internal"


def folder_name(target: str) -> str:
    """A folder name for a mount path, reversible, so that two paths never share a folder."""
    return re.sub(r"[^A-Za-z0-9.-]", lambda match: f"_{ord(match[0]):x}_", target.strip("/")) or "_root_"
