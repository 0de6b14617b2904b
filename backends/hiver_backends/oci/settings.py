"""The `[oci]` table of the configuration file, validated strictly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from msgspec import Struct

from hiver_backends.linux.options import check_common, wrong
from hiver_backends.linux.options import parse as read_options
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
    """Raises `InvalidError` naming the key."""
    settings = read_options("oci", options, Settings)
    check_common("oci", settings)
    if not 65536 <= settings.userns_base <= LAST_HOST_ID - 65535:
        raise wrong("oci", "userns_base", "must lie between 65536 and 0x7fff0000")
    return settings


def host_id(settings: Settings, slot: int) -> int:
    """First host uid and gid of a slot's range. Raises `InvalidError` beyond the last range."""
    first = settings.userns_base + slot * 65536
    if slot < 0 or first + 65535 > LAST_HOST_ID:
        raise InvalidError(f"no user-id range is left for slot {slot}")
    return first
