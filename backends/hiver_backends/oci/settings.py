"""The `[oci]` table of the configuration file, validated strictly."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from hiverd.contracts.errors import InvalidError

UsernsMode = Literal["auto", "required", "off"]

FIRST_HOST_ID: Final = 0x70000000
LAST_HOST_ID: Final = 0x7FFFFFFF


class Settings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the plug-in; the names are the keys of the table."""

    runtime: str = "auto"
    """`auto`, a program's name (`crun`, `runc`, `runsc`) or its absolute path."""
    conmon: str = "conmon"
    """The monitor program, by name or absolute path."""
    init: str = "catatonit"
    """The program that becomes process 1 of every sandbox, by name or absolute path. Must be linked statically."""
    userns: UsernsMode = "auto"
    """`required`: refuse to work without user namespaces. `off`: the sandbox's root is the host's, unprivileged."""
    userns_base: int = FIRST_HOST_ID
    """First host id of slot 0; each slot has the next 65,536."""
    log_max_bytes: int = 16 * 1024 * 1024
    """The entrypoint's output kept on disk, per sandbox."""
    seccomp: str = "default"
    """`default`, or the path of a profile in the form of the OCI runtime specification's `linux.seccomp`."""
    default_image: str = "host"
    """What the image name `agent-base` means when the alias table does not say."""
    image_roots: tuple[str, ...] = ()
    """Folders below which API callers may name images by path (`dir:`, `oci:`, archives)."""
    insecure_registries: tuple[str, ...] = ()
    """Registries (`host` or `host:port`) spoken to without TLS; loopback ones always may be."""
    host_usr_local: bool = True
    """Whether the image `host` shows the host's /usr/local."""
    parallelism: int = 0
    """Sandboxes built at the same time; 0 chooses by the number of processors."""


def parse(options: Mapping[str, Any]) -> Settings:
    """Raises `InvalidError` naming the key, with the nearest known one for an unknown key."""
    known = Settings.__struct_fields__
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise InvalidError(f"[oci] has no option {key!r}{hint}", field=f"oci.{key}")
    try:
        settings = msgspec.convert(dict(options), Settings)
    except msgspec.ValidationError as error:
        raise InvalidError(f"[oci]: {error}", field="oci") from error
    _check_ranges(settings)
    return settings


def _check_ranges(settings: Settings) -> None:
    if not 65536 <= settings.userns_base <= LAST_HOST_ID - 65535:
        raise InvalidError("[oci] userns_base must lie between 65536 and 0x7fff0000", field="oci.userns_base")
    if settings.log_max_bytes < 65536:
        raise InvalidError("[oci] log_max_bytes must be at least 65536", field="oci.log_max_bytes")
    if settings.parallelism < 0:
        raise InvalidError("[oci] parallelism must not be negative", field="oci.parallelism")
    if settings.seccomp != "default" and not Path(settings.seccomp).is_absolute():
        raise InvalidError("[oci] seccomp must be 'default' or an absolute path", field="oci.seccomp")
    for root in settings.image_roots:
        if not Path(root).is_absolute():
            raise InvalidError(f"[oci] image_roots: {root!r} is not an absolute path", field="oci.image_roots")


def host_id(settings: Settings, slot: int) -> int:
    """First host uid and gid of a slot's range. Raises `InvalidError` beyond the last range."""
    first = settings.userns_base + slot * 65536
    if slot < 0 or first + 65535 > LAST_HOST_ID:
        raise InvalidError(f"no user-id range is left for slot {slot}")
    return first
