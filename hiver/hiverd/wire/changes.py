"""What an apply may change, and what it did change (PROTOCOL 0.5, 3.9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import msgspec

from hiverd.strict import to_builtins
from hiverd.wire.effective import (
    effective_cpu,
    effective_egress,
    effective_entrypoint,
    effective_extra_hosts,
    effective_image,
    effective_memory_mib,
    effective_request_cpu,
    fill_acls,
)
from hiverd.wire.model import SandboxConfig

Family = Literal["old", "new"]

_IMMUTABLE: Final[Mapping[str, Callable[[SandboxConfig], object]]] = {
    "image": effective_image,
    "isolation": lambda config: config.isolation,
    "cpu": effective_cpu,
    "request_cpu": effective_request_cpu,
    "memory": effective_memory_mib,
    "entrypoint": effective_entrypoint,
    "cwd": lambda config: config.cwd,
    "tty": lambda config: bool(config.tty),
    "env": lambda config: config.env or {},
    "extra_hosts": lambda config: set(effective_extra_hosts(config)),
}
"""Fields fixed at creation, and what each of them means: two spellings of one meaning are no difference."""

_OLD_SPELLING: Final[Mapping[str, Callable[[SandboxConfig], object]]] = {
    "cpu": lambda config: math.ceil(effective_cpu(config)),
    "entrypoint": lambda config: " ".join(effective_entrypoint(config) or ()).split(),
}
"""How old clients were shown a field: sending that back asks for no change."""


def merge_immutables(
    current: SandboxConfig, desired: SandboxConfig, *, family: Family = "new"
) -> tuple[SandboxConfig, list[str]]:
    """The desired configuration with the fields fixed at creation kept, and a warning for each that asked otherwise.

    An immutable field that the request leaves out, or gives with the value in force, raises no warning.
    """
    warnings = [
        f"{field}: cannot be changed after the sandbox is created; the present value is kept"
        for field in _IMMUTABLE
        if getattr(desired, field) is not None and not _is_same(field, current, desired, family)
    ]
    kept = {field: getattr(current, field) for field in _IMMUTABLE}
    return msgspec.structs.replace(desired, **kept), warnings


def _is_same(field: str, current: SandboxConfig, desired: SandboxConfig, family: Family) -> bool:
    meaning = _IMMUTABLE[field]
    if meaning(current) == meaning(desired):
        return True
    old = _OLD_SPELLING.get(field)
    return family == "old" and old is not None and old(current) == old(desired)


def diff_configs(
    current: SandboxConfig, new: SandboxConfig, *, default_egress: Literal["allow", "deny"] = "allow"
) -> dict[str, Any]:
    """The `changes` object of PROTOCOL 3.9: `fs` and `egress` entries added and removed, whole; `{}` for a no-op.

    `warnings` are not part of it: the caller adds those of `merge_immutables`. Entries hold credentials.
    Mounts are compared by path after ACL defaulting, rules as a set: a new order alone is no change.
    """
    changes: dict[str, Any] = {}
    _put(changes, "fs", _mounts(current), _mounts(new))
    _put(changes, "egress", _rules(current, default_egress), _rules(new, default_egress))
    return changes


def _put(changes: dict[str, Any], name: str, before: Mapping[Any, Any], after: Mapping[Any, Any]) -> None:
    added = [entry for key, entry in after.items() if before.get(key) != entry]
    removed = [entry for key, entry in before.items() if after.get(key) != entry]
    part = {side: entries for side, entries in (("added", added), ("removed", removed)) if entries}
    if part:
        changes[name] = part


def _mounts(config: SandboxConfig) -> dict[str, Any]:
    return {entry.mount: to_builtins(fill_acls(entry)) for entry in config.fs or ()}


def _rules(config: SandboxConfig, default: Literal["allow", "deny"]) -> dict[bytes, Any]:
    rules = effective_egress(config, default)
    return {msgspec.json.encode(rule, order="deterministic"): to_builtins(rule) for rule in rules}
