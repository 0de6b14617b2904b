"""What this host and its Engine offer."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar, cast

from msgspec import Struct

from hiver_backends.linux.conmon import ConmonProgram
from hiver_backends.linux.tools import find_conmon, find_program, privileges, program_finding, run_folder
from hiverd.contracts.errors import HiverError
from hiverd.contracts.isolation import Finding

from . import guarantees
from .engine import EngineApi
from .settings import Settings

_T = TypeVar("_T")
_CONNECT_SECONDS: Final = 5.0


class InPool(Protocol):
    """Runs blocking work in a thread."""

    def __call__(self, work: Callable[[], _T], /) -> Awaitable[_T]: ...


class Offer(Struct, frozen=True, kw_only=True):
    """The outcome of probing; parts that are missing are None, and a finding says why."""

    conmon: ConmonProgram | None
    init: str | None
    info: dict[str, Any]
    podman: bool
    """Whether it is Podman that speaks Docker's API here."""
    findings: list[Finding]


class Peer(Struct, frozen=True, kw_only=True):
    """Who holds the Engine's socket (SO_PEERCRED)."""

    pid: int = 0
    """0 if it cannot be seen from here."""
    uid: int = 0


async def look(settings: Settings, engine: EngineApi, run_dir: Path, in_pool: InPool) -> Offer:
    """Looks for everything; changes nothing."""
    conmon, init = await in_pool(lambda: (find_conmon(settings.conmon), find_program(settings.init)))
    findings = [privileges(), run_folder(run_dir)]
    findings.append(program_finding("conmon", settings.conmon, conmon.path if conmon else None, "conmon"))
    findings.append(program_finding("init", settings.init, init, "catatonit"))
    info: dict[str, Any] = {}
    podman = False
    kind = endpoint_kind(engine.endpoint)
    if kind != "unix":
        findings += guarantees.findings({}, {"ApiVersion": "1.41"}, kind, local_root=False)[:1]
    else:
        try:
            info, version = await engine.describe()
        except HiverError as error:
            remedy = "start it (systemctl start docker), or name its socket: host below [docker], or DOCKER_HOST"
            findings.append(Finding("engine", ok=False, detail=error.message, remedy=remedy))
        else:
            holder = await in_pool(lambda: peer(engine.endpoint))
            findings += judged(settings, info, version, holder)
            podman = guarantees.is_podman(version)
    return Offer(conmon=conmon, init=init, info=info, podman=podman, findings=findings)


def judged(settings: Settings, info: dict[str, Any], version: dict[str, Any], holder: Peer) -> list[Finding]:
    """What the Engine's own words, and who says them, mean for our guarantees."""
    local_root = guarantees.local_root(
        info, "unix", euid=os.geteuid(), kernel_release=os.uname().release, engine_pid=holder.pid
    )
    return guarantees.findings(
        info, version, "unix", local_root=local_root, engine_uid=holder.uid, accept=settings.accept
    )


def endpoint_kind(endpoint: str) -> guarantees.EndpointKind:
    """By the address's scheme."""
    scheme = endpoint.partition("://")[0]
    if scheme in {"unix", "ssh", "npipe"}:
        return cast("guarantees.EndpointKind", scheme)
    return "tcp"


def peer(endpoint: str) -> Peer:
    """The process behind a UNIX socket. Blocking."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_CONNECT_SECONDS)
            connection.connect(endpoint.removeprefix("unix://"))
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except OSError:
        return Peer()
    pid, uid, _ = struct.unpack("3i", credentials)
    return Peer(pid=pid, uid=uid)
