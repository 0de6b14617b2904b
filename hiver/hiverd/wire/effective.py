"""What a configuration means once absent members are filled in (PROTOCOL 4.1). The defaults are the operator's."""

from __future__ import annotations

from typing import Final, Literal, TypeVar

import msgspec

from hiverd.wire.model import AclRule, EgressRule, FileSystem, SandboxConfig
from hiverd.wire.validation import split_extra_host

DEFAULT_IMAGE: Final = "agent-base"
DEFAULT_CPU: Final = 1.0
DEFAULT_REQUEST_CPU: Final = 0.5
DEFAULT_MEMORY_MIB: Final = 512
DEFAULT_TTL_SECONDS: Final = 1800
MIN_CPU: Final = 0.01
"""The kernel's smallest quota is 1 ms in a period of 100 ms."""
ALLOW_ALL: Final = EgressRule(access="allow", host="*")

F = TypeVar("F", bound=FileSystem)


def effective_image(config: SandboxConfig, header: str | None = None, default: str = DEFAULT_IMAGE) -> str:
    """The image to run: the configuration's, else the header `x-hiver-image`, else the default (PROTOCOL 3.1)."""
    return config.image or header or default


def effective_cpu(config: SandboxConfig, default: float = DEFAULT_CPU) -> float:
    """Number of CPUs, at least what the kernel can limit to."""
    return max(default if config.cpu is None else config.cpu, MIN_CPU)


def effective_request_cpu(config: SandboxConfig) -> float:
    """CPUs that the caller wants reserved. Advisory: one host reserves nothing."""
    return DEFAULT_REQUEST_CPU if config.request_cpu is None else config.request_cpu


def effective_memory_mib(config: SandboxConfig, default: int = DEFAULT_MEMORY_MIB) -> int:
    """Memory limit in MiB."""
    return default if config.memory is None else config.memory


def effective_memory_bytes(config: SandboxConfig, default_mib: int = DEFAULT_MEMORY_MIB) -> int:
    """Memory limit in bytes."""
    return effective_memory_mib(config, default_mib) * 1024 * 1024


def effective_ttl_seconds(config: SandboxConfig, default: int = DEFAULT_TTL_SECONDS) -> int | None:
    """Seconds of inactivity after which the sandbox ends; None: never (the wire's 0)."""
    ttl_seconds = default if config.ttl is None else config.ttl
    return None if ttl_seconds == 0 else ttl_seconds


def effective_entrypoint(config: SandboxConfig) -> tuple[str, ...] | None:
    """The argv; a string is split on white space, without quoting rules. None: the image's own entrypoint."""
    entrypoint = config.entrypoint
    argv = tuple(entrypoint.split()) if isinstance(entrypoint, str) else entrypoint
    return argv or None


def effective_extra_hosts(config: SandboxConfig) -> tuple[tuple[str, str], ...]:
    """Pairs of host name and address; the address may be `host-gateway`."""
    pairs = (split_extra_host(entry) for entry in config.extra_hosts or ())
    return tuple(pair for pair in pairs if pair is not None)


def effective_egress(config: SandboxConfig, default: Literal["allow", "deny"] = "allow") -> tuple[EgressRule, ...]:
    """The rules in force; an absent list means the operator's default (PROTOCOL 0.2), an empty one denies all."""
    if config.egress is not None:
        return config.egress
    return (ALLOW_ALL,) if default == "allow" else ()


def fill_acls(entry: F) -> F:
    """The entry with the rule that absent or empty `acls` stand for: all of the mount, read-write."""
    if entry.acls:
        return entry
    return msgspec.structs.replace(entry, acls=(AclRule(path=f"{entry.mount}/**", access="rw"),))
