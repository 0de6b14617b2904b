"""The `[docker]` table of the configuration file, validated strictly."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from hiverd.contracts.errors import InvalidError

from . import guarantees

_DEFAULT_HOST: Final = "unix:///var/run/docker.sock"
_SCHEMES: Final = ("unix://", "tcp://", "http://", "https://", "ssh://")


class Settings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the plug-in; the names are the keys of the table."""

    host: str = ""
    """The Engine's address; empty: DOCKER_HOST, or else the usual socket."""
    runtime: str = ""
    """Name of one of the Engine's runtimes; empty: its default one."""
    conmon: str = "conmon"
    """The monitor program of entrypoints, by name or absolute path."""
    init: str = "catatonit"
    """The program that becomes process 1 of every sandbox, by name or absolute path. Must be linked statically."""
    log_max_bytes: int = 16 * 1024 * 1024
    """The entrypoint's output kept on disk, per sandbox."""
    seccomp: str = "default"
    """`default`, or the path of a profile in the form of the OCI runtime specification's `linux.seccomp`."""
    default_image: str = "host"
    """What the image name `agent-base` means when the alias table does not say."""
    image_roots: tuple[str, ...] = ()
    """Folders below which API callers may name images by path (`dir:`)."""
    host_usr_local: bool = True
    """Whether the image `host` shows the host's /usr/local."""
    accept: tuple[str, ...] = ()
    """Names of guarantees that the operator can do without, where an Engine cannot keep them."""
    timeout_seconds: int = 60
    """How long the Engine may take for one answer. Pulls have no limit but that they go on."""
    parallelism: int = 0
    """Sandboxes built at the same time; 0 chooses by the number of processors."""


def parse(options: Mapping[str, Any]) -> Settings:
    """Raises `InvalidError` naming the key, with the nearest known one for an unknown key."""
    known = Settings.__struct_fields__
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise InvalidError(f"[docker] has no option {key!r}{hint}", field=f"docker.{key}")
    try:
        settings = msgspec.convert(dict(options), Settings)
    except msgspec.ValidationError as error:
        raise InvalidError(f"[docker]: {error}", field="docker") from error
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    unknown = guarantees.unknown_names(settings.accept)
    if unknown:
        known = ", ".join(guarantees.ACCEPTABLE)
        raise InvalidError(
            f"[docker] accept: {unknown[0]!r} cannot be done without, or is unknown; these can: {known}",
            field="docker.accept",
        )
    if settings.host and not settings.host.startswith(_SCHEMES):
        raise InvalidError(f"[docker] host must begin with one of {', '.join(_SCHEMES)}", field="docker.host")
    if settings.log_max_bytes < 65536:
        raise InvalidError("[docker] log_max_bytes must be at least 65536", field="docker.log_max_bytes")
    if settings.timeout_seconds < 1:
        raise InvalidError("[docker] timeout_seconds must be at least 1", field="docker.timeout_seconds")
    if settings.parallelism < 0:
        raise InvalidError("[docker] parallelism must not be negative", field="docker.parallelism")
    if settings.seccomp != "default" and not Path(settings.seccomp).is_absolute():
        raise InvalidError("[docker] seccomp must be 'default' or an absolute path", field="docker.seccomp")
    for root in settings.image_roots:
        if not Path(root).is_absolute():
            raise InvalidError(f"[docker] image_roots: {root!r} is not an absolute path", field="docker.image_roots")


def endpoint(settings: Settings) -> str:
    """The Engine's address: the option, else DOCKER_HOST, else the usual socket."""
    return settings.host or os.environ.get("DOCKER_HOST") or _DEFAULT_HOST
