"""What an apply may change, and what it did change (PROTOCOL 0.5, 3.9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import msgspec

from hiverd.strict import to_builtins
from hiverd.wire.effective import (
    DEFAULT_CPU,
    DEFAULT_IMAGE,
    DEFAULT_MEMORY_MIB,
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


class Defaults(msgspec.Struct, frozen=True):
    """What absent members mean on this server: the operator's choice."""

    image: str = DEFAULT_IMAGE
    cpu: float = DEFAULT_CPU
    memory_mib: int = DEFAULT_MEMORY_MIB


BUILT_IN: Final = Defaults()

Meaning = Callable[[SandboxConfig, Defaults], object]


def _image(config: SandboxConfig, defaults: Defaults) -> str:
    """The client's default name stands for the operator's default (PROTOCOL 0.19)."""
    image = effective_image(config, None, defaults.image)
    return defaults.image if image == DEFAULT_IMAGE else image


_IMMUTABLE: Final[Mapping[str, Meaning]] = {
    "image": _image,
    "isolation": lambda config, _: config.isolation,
    "cpu": lambda config, defaults: effective_cpu(config, defaults.cpu),
    "request_cpu": lambda config, _: effective_request_cpu(config),
    "memory": lambda config, defaults: effective_memory_mib(config, defaults.memory_mib),
    "entrypoint": lambda config, _: effective_entrypoint(config),
    "cwd": lambda config, _: config.cwd,
    "tty": lambda config, _: bool(config.tty),
    "env": lambda config, _: config.env or {},
    "extra_hosts": lambda config, _: set(effective_extra_hosts(config)),
}
"""Fields fixed at creation, and what each of them means: two spellings of one meaning are no difference."""

_OLD_SPELLING: Final[Mapping[str, Meaning]] = {
    "cpu": lambda config, defaults: math.ceil(effective_cpu(config, defaults.cpu)),
    "entrypoint": lambda config, _: " ".join(effective_entrypoint(config) or ()).split(),
}
"""How old clients were shown a field: sending that back asks for no change."""


def merge_immutables(
    current: SandboxConfig, desired: SandboxConfig, *, family: Family = "new", defaults: Defaults = BUILT_IN
) -> tuple[SandboxConfig, list[str]]:
    """The desired configuration with the fields fixed at creation kept, and a warning for each that asked otherwise.

    An immutable field that the request leaves out, or gives with the value in force, raises no warning.
    """
    warnings = [
        f"{field}: cannot be changed after the sandbox is created; the present value is kept"
        for field in _IMMUTABLE
        if getattr(desired, field) is not None and not _is_same(field, current, desired, family, defaults)
    ]
    kept = {field: getattr(current, field) for field in _IMMUTABLE}
    return msgspec.structs.replace(desired, **kept), warnings


def _is_same(field: str, current: SandboxConfig, desired: SandboxConfig, family: Family, defaults: Defaults) -> bool:
    meaning = _IMMUTABLE[field]
    if meaning(current, defaults) == meaning(desired, defaults):
        return True
    old = _OLD_SPELLING.get(field)
    return family == "old" and old is not None and old(current, defaults) == old(desired, defaults)


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
