"""The rules of PROTOCOL 4.4, and those without which a sandbox could not be built. Pure; the first breach is raised.

Bounds exist so that a request cannot ask for more than a host could ever give; the operator's limits are applied later.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Final

from hiverd.strict import fail, member, shown
from hiverd.wire.events import EVENT_TYPES
from hiverd.wire.keys import KEY_RULE, is_key
from hiverd.wire.model import DEFAULT_MOUNT, SandboxConfig, Snapshot
from hiverd.wire.validation_egress import validate_egress
from hiverd.wire.validation_files import clean_path, validate_absolute, validate_file_systems, validate_mount_path

MAX_CPU: Final = 1024
MIN_MEMORY_MIB: Final = 128
MAX_MEMORY_MIB: Final = 16 * 1024 * 1024
MAX_TTL_SECONDS: Final = 10 * 365 * 86_400
MAX_DENY_WAIT_SECONDS: Final = 3600
MAX_ARGUMENT_BYTES: Final = 131_071
"""Linux's MAX_ARG_STRLEN without the closing NUL: the longest argument, and NAME=value, that execve takes."""
MAX_ARGUMENTS: Final = 4096
MAX_ENTRIES: Final = 1024
"""Variables, host names, include patterns: more than this in one list is a mistake."""

_HOST_NAME: Final = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*\.?")
_IMAGE: Final = re.compile(r"[^\s\x00-\x1f\x7f-][^\s\x00-\x1f\x7f]*")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
HOST_GATEWAY: Final = "host-gateway"


def validate_config(config: SandboxConfig) -> None:
    """Checks every rule. Raises `InvalidError` with `field` set and a message of the shape `<field>: <reason>`."""
    _validate_resources(config)
    _validate_process(config)
    _validate_extra_hosts(config.extra_hosts or ())
    _validate_events(config.events or ())
    if config.fs is not None:
        validate_file_systems(config.fs)
    if config.egress is not None:
        validate_egress(config.egress)
    if config.snapshot is not None:
        _validate_snapshot(config.snapshot, config)


def _validate_resources(config: SandboxConfig) -> None:
    _validate_cpu("cpu", config.cpu)
    _validate_cpu("request_cpu", config.request_cpu)
    if config.memory is not None:
        if config.memory < MIN_MEMORY_MIB:
            fail("memory", f"must be >= {MIN_MEMORY_MIB} (MiB)")
        if config.memory > MAX_MEMORY_MIB:
            fail("memory", f"must be <= {MAX_MEMORY_MIB} (MiB)")
    _validate_seconds("ttl", config.ttl, MAX_TTL_SECONDS)
    _validate_seconds("egress_deny_wait", config.egress_deny_wait, MAX_DENY_WAIT_SECONDS)


def _validate_cpu(field: str, cpu: float | None) -> None:
    if cpu is None:
        return
    if not cpu > 0:
        fail(field, "must be > 0")
    if cpu > MAX_CPU:
        fail(field, f"must be <= {MAX_CPU}")


def _validate_seconds(field: str, seconds: int | None, maximum: int) -> None:
    if seconds is None:
        return
    if seconds < 0:
        fail(field, "must be >= 0")
    if seconds > maximum:
        fail(field, f"must be <= {maximum} (seconds)")


def _validate_process(config: SandboxConfig) -> None:
    if config.image is not None and (len(config.image) > 1024 or _IMAGE.fullmatch(config.image) is None):
        fail("image", f"must be an image reference without blanks, got {shown(config.image)}")
    if isinstance(config.entrypoint, str):
        validate_arguments("entrypoint", config.entrypoint.split())
    elif config.entrypoint is not None:
        validate_arguments("entrypoint", config.entrypoint)
        if not config.entrypoint[0]:
            fail("entrypoint[0]", "must name a program")
    if config.cwd is not None:
        validate_absolute("cwd", config.cwd)
    if config.env is not None:
        validate_environment("env", config.env)


def validate_arguments(field: str, arguments: Sequence[str]) -> None:
    """Checks what execve could not take: NUL characters, arguments that are too long, too many of them."""
    if len(arguments) > MAX_ARGUMENTS:
        fail(field, f"must have at most {MAX_ARGUMENTS} arguments")
    for index, argument in enumerate(arguments):
        validate_text(f"{field}[{index}]", argument)


def validate_text(field: str, text: str) -> None:
    """Checks one argument of a command."""
    if "\0" in text:
        fail(field, "must not hold a NUL character")
    if len(text) > MAX_ARGUMENT_BYTES or len(text.encode()) > MAX_ARGUMENT_BYTES:
        fail(field, f"must be at most {MAX_ARGUMENT_BYTES} bytes")


def validate_environment(field: str, env: dict[str, str]) -> None:
    """Checks names and values of environment variables."""
    if len(env) > MAX_ENTRIES:
        fail(field, f"must have at most {MAX_ENTRIES} variables")
    for name, value in env.items():
        where = member(field, name)
        if not name:
            fail(field, "a variable needs a name")
        if "=" in name or _CONTROL.search(name):
            fail(where, "the name must not hold = or control characters")
        if "\0" in value:
            fail(where, "must not hold a NUL character")
        if len(name.encode()) + 1 + len(value.encode()) > MAX_ARGUMENT_BYTES:
            fail(where, f"name and value must be at most {MAX_ARGUMENT_BYTES - 1} bytes together")


def split_extra_host(entry: str) -> tuple[str, str] | None:
    """`host:ip` as a pair, with the brackets of `[v6]` taken off; None if it is not one."""
    host, colon, address = entry.partition(":")
    if not colon or _HOST_NAME.fullmatch(host) is None:
        return None
    if address == HOST_GATEWAY:
        return host, address
    if address.startswith("[") and address.endswith("]"):
        address = address[1:-1]
    try:
        return host, str(ip_address(address)) if "%" not in address else ""
    except ValueError:
        return None


def _validate_extra_hosts(entries: Sequence[str]) -> None:
    if len(entries) > MAX_ENTRIES:
        fail("extra_hosts", f"must have at most {MAX_ENTRIES} entries")
    for index, entry in enumerate(entries):
        pair = split_extra_host(entry)
        if pair is None or not pair[1]:
            fail(f"extra_hosts[{index}]", f'must be "host:ip" or "host:{HOST_GATEWAY}", got {shown(entry)}')


def _validate_events(events: Sequence[str]) -> None:
    for index, event in enumerate(events):
        if event not in EVENT_TYPES:
            fail(f"events[{index}]", f"unknown value {shown(event)}")


def _validate_snapshot(snapshot: Snapshot, config: SandboxConfig) -> None:
    if snapshot.is_old_form and (snapshot.vm is not None or snapshot.files is not None):
        fail("snapshot", "restore_key, write_key and include are the old form and cannot stand beside vm and files")
    validate_snapshot_parts(snapshot, "snapshot.")
    files = snapshot.files
    if files is not None and files.mount is not None:
        mounts = {DEFAULT_MOUNT} if config.fs is None else {clean_path(entry.mount) for entry in config.fs}
        if clean_path(files.mount) not in mounts:
            fail("snapshot.files.mount", f"must be the mount of an entry of fs, got {shown(files.mount)}")


def validate_snapshot_parts(snapshot: Snapshot, prefix: str) -> None:
    """Checks the parts of a snapshot; whether `files.mount` is a mount is for those who know the mounts."""
    if snapshot.vm is not None:
        _validate_snapshot_key(f"{prefix}vm.key", snapshot.vm.key)
    if snapshot.files is not None:
        _validate_snapshot_key(f"{prefix}files.key", snapshot.files.key)
        _validate_include(f"{prefix}files.include", snapshot.files.include)
        if snapshot.files.mount is not None:
            validate_mount_path(f"{prefix}files.mount", snapshot.files.mount)
    _validate_snapshot_key(f"{prefix}restore_key", snapshot.restore_key)
    _validate_snapshot_key(f"{prefix}write_key", snapshot.write_key)
    _validate_include(f"{prefix}include", snapshot.include)


def _validate_snapshot_key(field: str, key: str | None) -> None:
    if key is not None and not is_key(key):
        fail(field, f"must be {KEY_RULE}, got {shown(key)}")


def _validate_include(field: str, include: Sequence[str] | None) -> None:
    if include is None:
        return
    if not include:
        fail(field, "must not be empty")
    if len(include) > MAX_ENTRIES:
        fail(field, f"must have at most {MAX_ENTRIES} patterns")
    for index, pattern in enumerate(include):
        if not pattern.strip() or "\0" in pattern or ".." in pattern.split("/"):
            fail(f"{field}[{index}]", f"must be a path pattern without .. segments, got {shown(pattern)}")
