"""The plug-ins' own tables of the configuration file, validated strictly."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import msgspec
from msgspec import Struct

from hiverd.contracts.errors import InvalidError

_LEAST_LOG_BYTES: Final = 65536
S = TypeVar("S", bound=Struct)


class Common(Protocol):
    """Options that every plug-in for containers has."""

    @property
    def log_max_bytes(self) -> int: ...
    @property
    def parallelism(self) -> int: ...
    @property
    def seccomp(self) -> str: ...
    @property
    def image_roots(self) -> tuple[str, ...]: ...


def parse(table: str, options: Mapping[str, Any], kind: type[S]) -> S:
    """Raises `InvalidError` naming the key, with the nearest known one for an unknown key."""
    known = kind.__struct_fields__
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise InvalidError(f"[{table}] has no option {key!r}{hint}", field=f"{table}.{key}")
    try:
        return msgspec.convert(dict(options), kind)
    except msgspec.ValidationError as error:
        raise InvalidError(f"[{table}]: {error}", field=table) from error


def check_common(table: str, settings: Common) -> None:
    """Raises `InvalidError` naming the key."""
    if settings.log_max_bytes < _LEAST_LOG_BYTES:
        raise wrong(table, "log_max_bytes", f"must be at least {_LEAST_LOG_BYTES}")
    if settings.parallelism < 0:
        raise wrong(table, "parallelism", "must not be negative")
    if settings.seccomp != "default" and not Path(settings.seccomp).is_absolute():
        raise wrong(table, "seccomp", "must be 'default' or an absolute path")
    for root in settings.image_roots:
        if not Path(root).is_absolute():
            raise wrong(table, "image_roots", f": {root!r} is not an absolute path", space="")


def wrong(table: str, key: str, reason: str, *, space: str = " ") -> InvalidError:
    """To be raised."""
    return InvalidError(f"[{table}] {key}{space}{reason}", field=f"{table}.{key}")
