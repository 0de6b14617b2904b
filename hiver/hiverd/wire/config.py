"""The life of a sandbox configuration on the wire: decode, check, fill in, compare, answer (PROTOCOL 3.9, 4).

config = decode_config(body)        # what the caller wrote, or InvalidError
validate_config(config)             # the rules of PROTOCOL 4.4, or InvalidError
config = with_defaults(config)      # fs and ACLs filled in; the rest is asked for with effective_*
answer = config_to_wire(config, family="new")
"""

from __future__ import annotations

import math
from typing import Any, Final, Literal

import msgspec

from hiverd.strict import build, fail, parse_json, to_builtins
from hiverd.wire.changes import diff_configs, merge_immutables
from hiverd.wire.effective import (
    effective_cpu,
    effective_egress,
    effective_entrypoint,
    effective_extra_hosts,
    effective_image,
    effective_memory_bytes,
    effective_memory_mib,
    effective_request_cpu,
    effective_ttl_seconds,
    fill_acls,
)
from hiverd.wire.model import (
    DEFAULT_MOUNT,
    AclRule,
    AnyFileSystem,
    EgressOverride,
    EgressRule,
    FileSystem,
    LocalFileSystem,
    SandboxConfig,
    Snapshot,
    SnapshotFiles,
    SnapshotVm,
)
from hiverd.wire.redaction import REDACTED, redact_config
from hiverd.wire.validation import validate_config
from hiverd.wire.validation_files import clean_path

__all__ = [
    "REDACTED",
    "AclRule",
    "AnyFileSystem",
    "EgressOverride",
    "EgressRule",
    "FileSystem",
    "LocalFileSystem",
    "SandboxConfig",
    "Snapshot",
    "SnapshotFiles",
    "SnapshotVm",
    "config_to_wire",
    "decode_config",
    "diff_configs",
    "effective_cpu",
    "effective_egress",
    "effective_entrypoint",
    "effective_extra_hosts",
    "effective_image",
    "effective_memory_bytes",
    "effective_memory_mib",
    "effective_request_cpu",
    "effective_ttl_seconds",
    "merge_immutables",
    "redact_config",
    "validate_config",
    "with_defaults",
]

Family = Literal["old", "new"]

_OLD_FAMILY_BACKENDS: Final = frozenset({"local", "gdrive", "gcs"})
"""Those that every client of the old routes can parse (PROTOCOL 1.4)."""


def decode_config(raw: bytes) -> SandboxConfig:
    """Reads a request's body; an empty one is `{}`. Raises `InvalidError` whatever the input, never anything else.

    Only the shape is judged here; `validate_config` judges the values. Spelling is made uniform: paths are folded,
    methods upper-case, blank strings where only an absent member makes sense become absent.
    """
    return config_of_document(parse_json(raw) if raw.strip() else {})


def config_of_document(document: Any) -> SandboxConfig:
    """As `decode_config`, from JSON that has been parsed already, such as a stored configuration."""
    return _normalised(build(SandboxConfig, _with_async_spelled_right(document)))


def _with_async_spelled_right(document: Any) -> Any:
    """`allow_sandbox` writes the Python name `async_` for `async` (PROTOCOL 1.4)."""
    if not isinstance(document, dict) or not isinstance(document.get("fs"), list):
        return document
    return {**document, "fs": [_rename_async(entry, f"fs[{i}]") for i, entry in enumerate(document["fs"])]}


def _rename_async(entry: Any, path: str) -> Any:
    if not isinstance(entry, dict) or "async_" not in entry:
        return entry
    if "async" in entry:
        fail(f"{path}.async", "is given twice, as async and as async_")
    return {("async" if name == "async_" else name): value for name, value in entry.items()}


def _normalised(config: SandboxConfig) -> SandboxConfig:
    return msgspec.structs.replace(
        config,
        image=config.image or None,
        cwd=config.cwd or None,
        entrypoint=_present_entrypoint(config.entrypoint),
        fs=None if config.fs is None else tuple(_normalised_mount(entry) for entry in config.fs),
        egress=None if config.egress is None else tuple(_normalised_rule(rule) for rule in config.egress),
        snapshot=_normalised_snapshot(config.snapshot),
    )


def _present_entrypoint(entrypoint: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    if isinstance(entrypoint, str):
        return entrypoint if entrypoint.strip() else None
    return entrypoint or None


def _normalised_mount(entry: AnyFileSystem) -> AnyFileSystem:
    return msgspec.structs.replace(entry, mount=clean_path(entry.mount))


def _normalised_rule(rule: EgressRule) -> EgressRule:
    methods = rule.methods
    return msgspec.structs.replace(
        rule,
        host=rule.host.strip(),
        methods=None if methods is None else tuple(method.upper() for method in methods),
    )


def _normalised_snapshot(snapshot: Snapshot | None) -> Snapshot | None:
    if snapshot is None or snapshot.files is None or snapshot.files.mount is None:
        return snapshot
    mount = clean_path(snapshot.files.mount)
    return msgspec.structs.replace(snapshot, files=msgspec.structs.replace(snapshot.files, mount=mount))


def with_defaults(config: SandboxConfig) -> SandboxConfig:
    """Fills in what answers show: `fs` absent is one read-write `/workspace` (PROTOCOL 0.3); each mount has ACLs.

    Nothing else is filled in (PROTOCOL 3.9): the absence of `cpu` and the like stays visible.
    """
    entries = (LocalFileSystem(mount=DEFAULT_MOUNT),) if config.fs is None else config.fs
    return msgspec.structs.replace(config, fs=tuple(fill_acls(entry) for entry in entries))


def config_to_wire(config: SandboxConfig, *, family: Family) -> dict[str, Any]:
    """The configuration as the JSON object of an answer. Holds secrets: it is for the sandbox's owner.

    `old` is for clients 0.1.15 to 0.1.18, which fail as a whole on what they do not know: `cpu` is rounded up, a list
    entrypoint joined, mounts of backends that they lack left out.
    """
    document: dict[str, Any] = to_builtins(config)
    for name in ("cpu", "request_cpu"):
        value = document.get(name)
        if isinstance(value, float) and value.is_integer():
            document[name] = int(value)
    if family == "old":
        _make_parsable_for_old_clients(document)
    if not document.get("fs"):
        document.pop("fs", None)  # clients refuse an empty list (PROTOCOL 2)
    return document


def _make_parsable_for_old_clients(document: dict[str, Any]) -> None:
    if "cpu" in document:
        document["cpu"] = math.ceil(document["cpu"])
    if isinstance(document.get("entrypoint"), list):
        document["entrypoint"] = " ".join(document["entrypoint"])
    if "fs" in document:
        document["fs"] = [entry for entry in document["fs"] if entry["backend"] in _OLD_FAMILY_BACKENDS]
    snapshot = document.get("snapshot", {})
    for name in ("restore_key", "write_key"):
        if "." in snapshot.get(name, ""):
            del snapshot[name]  # dots in keys came with 0.1.45
