"""Image names and image configurations (OCI image specification). No I/O."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from msgspec import Struct

from hiverd.contracts.errors import InvalidError
from hiverd.contracts.isolation import Image

BUNDLE_LABEL: Final = "hiver.bundle"
_LOCAL_TRANSPORTS: Final = ("oci-archive", "docker-archive", "oci")
_NAME: Final = re.compile(
    r"(?:(?P<registry>[a-zA-Z0-9][a-zA-Z0-9.\-]*(?::[0-9]+)?|\[[0-9a-fA-F:]+\](?::[0-9]+)?)/)?"
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
    r"(?::[\w][\w.\-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)
_TAG: Final = re.compile(r"[\w][\w.\-]{0,127}")


class Source(Struct, frozen=True):
    """Where skopeo finds an image."""

    reference: str
    """As the caller wrote it, after aliases."""
    location: str
    """In skopeo's notation."""
    path: str | None = None
    """The file or folder of a local image."""
    registry: str = ""
    """`host` or `host:port`; empty for the default one and for local images."""


def parse(reference: str) -> Source:
    """Raises `InvalidError` for what is no image name."""
    for transport in _LOCAL_TRANSPORTS:
        if reference.startswith(f"{transport}:"):
            return _local(reference, transport, reference[len(transport) + 1 :])
    name = reference.removeprefix("docker://")
    match = _NAME.fullmatch(name)
    if match is None or len(name) > 512:
        raise InvalidError(
            f"{reference!r} is no image name: use 'host', a registry reference such as 'registry:5000/name:tag',"
            " 'dir:/path', 'oci:/path[:tag]', 'oci-archive:/path[:tag]', 'docker-archive:/path[:tag]' or an alias",
            field="image",
        )
    registry = match.group("registry") or ""
    if not ("." in registry or ":" in registry or registry == "localhost"):
        registry = ""
    return Source(reference, f"docker://{name}", None, registry)


def _local(reference: str, transport: str, rest: str) -> Source:
    path, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:
        path, tag = rest, ""
    if tag and _TAG.fullmatch(tag) is None and transport != "docker-archive":
        raise InvalidError(f"image {reference!r}: {tag!r} is no tag", field="image")
    if not path.startswith("/"):
        raise InvalidError(f"image {reference!r}: the path must be absolute", field="image")
    return Source(reference, f"{transport}:{path}" + (f":{tag}" if tag else ""), path)


def is_loopback(registry: str) -> bool:
    """Whether a registry is on this machine, so that plain HTTP is as good as TLS."""
    host = registry.rpartition(":")[0] if re.search(r":[0-9]+$", registry) and registry != "::1" else registry
    host = host.strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def image_from_config(reference: str, handle: str, document: Mapping[str, Any]) -> Image:
    """An `Image` from an OCI or Docker image configuration document; what is missing or odd has its default."""
    inner = document.get("config") if isinstance(document.get("config"), Mapping) else {}
    config: Mapping[str, Any] = inner if isinstance(inner, Mapping) else {}
    return Image(
        reference=reference,
        handle=handle,
        entrypoint=_strings(config.get("Entrypoint")),
        cmd=_strings(config.get("Cmd")),
        env=_environment(_strings(config.get("Env"))),
        cwd=str(config.get("WorkingDir") or "/"),
        user=str(config.get("User") or ""),
        exposed_ports=_tcp_ports(config.get("ExposedPorts")),
    )


def labels(document: Mapping[str, Any]) -> dict[str, str]:
    """Labels of an image configuration."""
    config = document.get("config")
    found = config.get("Labels") if isinstance(config, Mapping) else None
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, Mapping) else {}


def _strings(value: object) -> tuple[str, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return tuple(str(item) for item in value)
    return ()


def _environment(entries: tuple[str, ...]) -> dict[str, str]:
    pairs = (entry.partition("=") for entry in entries)
    return {name: value for name, _, value in pairs if name}


def _tcp_ports(value: object) -> tuple[int, ...]:
    """Keys such as `80/tcp` and `53/udp`."""
    ports = set()
    for key in value if isinstance(value, Mapping) else ():
        number, _, protocol = str(key).partition("/")
        if number.isdecimal() and protocol in {"", "tcp"} and 0 < int(number) < 65536:
            ports.add(int(number))
    return tuple(sorted(ports))
