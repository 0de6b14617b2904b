"""The `[docker]` table of the configuration file, validated strictly."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct

from hiver_backends.linux.options import check_common, wrong
from hiver_backends.linux.options import parse as read_options

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
    """Raises `InvalidError` naming the key."""
    settings = read_options("docker", options, Settings)
    check_common("docker", settings)
    unknown = guarantees.unknown_names(settings.accept)
    if unknown:
        known = ", ".join(guarantees.ACCEPTABLE)
        reason = f": {unknown[0]!r} cannot be done without, or is unknown; these can: {known}"
        raise wrong("docker", "accept", reason, space="")
    if settings.host and not settings.host.startswith(_SCHEMES):
        raise wrong("docker", "host", f"must begin with one of {', '.join(_SCHEMES)}")
    if settings.timeout_seconds < 1:
        raise wrong("docker", "timeout_seconds", "must be at least 1")
    return settings


def endpoint(settings: Settings) -> str:
    """The Engine's address: the option, else DOCKER_HOST, else the usual socket."""
    return settings.host or os.environ.get("DOCKER_HOST") or _DEFAULT_HOST
