"""Finds plug-ins by entry point, and imports one only when it is used.

The groups are `hiver.isolation`, `hiver.filesystems` and `hiver.snapshots`; the entry point's name is what
configurations call the plug-in by.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, Literal, TypeVar, cast

from hiverd.contracts.errors import BackendError, UnsupportedError
from hiverd.contracts.filesystem import FileSystem
from hiverd.contracts.isolation import Isolation
from hiverd.contracts.snapshot import SnapshotStore

T = TypeVar("T")

log: Final = logging.getLogger(__name__)

Group = Literal["hiver.isolation", "hiver.filesystems", "hiver.snapshots"]

_CONTRACTS: Final[Mapping[Group, type]] = {
    "hiver.isolation": Isolation,
    "hiver.filesystems": FileSystem,
    "hiver.snapshots": SnapshotStore,
}
GROUPS: Final = tuple(_CONTRACTS)
_NOUNS: Final[Mapping[Group, str]] = {
    "hiver.isolation": "isolation",
    "hiver.filesystems": "file system backend",
    "hiver.snapshots": "snapshot store",
}
EXTRAS: Final[Mapping[str, str]] = {
    "gdrive": "gdrive",
    "gcs": "gcs",
    "s3": "s3",
    "azure": "azure",
    "onedrive": "onedrive",
    "external": "external",
    "docker": "docker",
    "microvm": "microvm",
}
"""Plug-in name -> the extra of our distribution that brings its dependencies."""


@cache
def _found(group: Group) -> Mapping[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


def names(group: Group) -> tuple[str, ...]:
    """The plug-ins that are installed, importable or not, in alphabetical order."""
    return tuple(sorted(_found(group)))


def isolation_class(name: str) -> type[Isolation]:
    """The class of an isolation plug-in, as `oci`. Errors as `load`."""
    return cast("type[Isolation]", load("hiver.isolation", name))


def file_system_class(name: str, *, field: str | None = None) -> type[FileSystem]:
    """The class for an `fs[].backend` value; `field` is the request's member that names it. Errors as `load`."""
    return cast("type[FileSystem]", load("hiver.filesystems", name, field=field))


def snapshot_store_class(name: str) -> type[SnapshotStore]:
    """The class of a snapshot store. Errors as `load`."""
    return cast("type[SnapshotStore]", load("hiver.snapshots", name))


def load(group: Group, name: str, *, field: str | None = None) -> type[Any]:
    """Imports a plug-in.

    Raises `UnsupportedError` if there is none of that name or if a library that it needs is missing (the message has
    the command that installs it), `BackendError` if it is broken.
    """
    point = _found(group).get(name)
    if point is None:
        raise UnsupportedError(_explain_unknown(group, name, field), field=field)
    try:
        plugin = point.load()
    except ModuleNotFoundError as error:
        if _is_own_module(point, error):
            raise BackendError(f"the plug-in {name} ({point.value}) is not installed completely") from error
        raise UnsupportedError(_explain_missing(group, name, error, field), field=field) from error
    except Exception as error:
        log.exception("plug-in %s (%s) cannot be imported", name, point.value)
        raise BackendError(f"the plug-in {name} ({point.value}) cannot be imported; the log has the reason") from error
    return _checked(group, point, plugin)


def _checked(group: Group, point: EntryPoint, plugin: object) -> type[Any]:
    contract = _CONTRACTS[group]
    if not isinstance(plugin, type) or not issubclass(plugin, contract):
        raise BackendError(f"the plug-in {point.name} ({point.value}) is not a {contract.__name__}")
    return plugin


def _is_own_module(point: EntryPoint, error: ModuleNotFoundError) -> bool:
    """True if what is missing is the plug-in's module itself, which no extra would bring."""
    return error.name is not None and f"{point.module}.".startswith(f"{error.name}.")


def _explain_unknown(group: Group, name: str, field: str | None) -> str:
    prefix = f"{field}: " if field else ""
    if name in EXTRAS:
        return f'{prefix}{_NOUNS[group]} "{name}" is not supported by this server yet'
    known = ", ".join(names(group)) or "none"
    return f'{prefix}unknown {_NOUNS[group]} "{name[:80]}"; installed: {known}'


def _explain_missing(group: Group, name: str, error: ModuleNotFoundError, field: str | None) -> str:
    prefix = f"{field}: " if field else ""
    remedy = f"pip install 'hiver[{EXTRAS[name]}]'" if name in EXTRAS else f"install {error.name}"
    return f'{prefix}{_NOUNS[group]} "{name}" needs the Python module {error.name}: {remedy}'


def build(cls: type[T], *arguments: Any) -> T:
    """Makes an instance; a library that is missed only now is reported as `load` does."""
    try:
        return cls(*arguments)
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"{cls.__name__} needs the Python module {error.name}, which is not installed"
        ) from error
