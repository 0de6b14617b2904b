"""From a configuration and an image to what an isolation plug-in must build."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Protocol

import msgspec

from hiverd.contracts.isolation import HOST_GATEWAY_ADDRESS, Image, WorkloadSpec
from hiverd.sandboxes import trust
from hiverd.sandboxes.mounting import Mounting
from hiverd.sandboxes.sandbox import Sandbox
from hiverd.wire.changes import Defaults
from hiverd.wire.config import (
    SandboxConfig,
    effective_cpu,
    effective_entrypoint,
    effective_extra_hosts,
    effective_image,
    effective_memory_bytes,
)

HOSTNAME_MAX: Final = 63
GATEWAY_VARIABLE: Final = "HIVER_GATEWAY_URL"
"""Where the client in a sandbox looks for the server."""


class SpecDefaults(Defaults, frozen=True, kw_only=True):
    """What the operator gives to a configuration that does not say, and cannot say."""

    pids_max: int
    gateway_url: str
    """This server as it is reached from inside (PROTOCOL 4.1)."""


class ImageDefaults(Protocol):
    """What an image's short name gives to a configuration that does not say (PROTOCOL 0.19)."""

    @property
    def entrypoint(self) -> tuple[str, ...] | None: ...
    @property
    def cwd(self) -> str | None: ...
    @property
    def tty(self) -> bool | None: ...
    @property
    def env(self) -> Mapping[str, str]: ...


class SpecBuilder:
    def __init__(
        self, defaults: SpecDefaults, mounting: Mounting, image_defaults: Mapping[str, ImageDefaults] | None = None
    ) -> None:
        """`image_defaults`: by the name that a configuration gives."""
        self._defaults = defaults
        self._mounting = mounting
        self._image_defaults = image_defaults or {}

    def image_name(self, config: SandboxConfig) -> str:
        """The image in effect: the client's default name stands for the configured default (PROTOCOL 0.19)."""
        return effective_image(config, None, self._defaults.image)

    async def build(self, sandbox: Sandbox, image: Image, volume: Path) -> WorkloadSpec:
        image = self._with_alias_defaults(image, self.image_name(sandbox.config))
        config = sandbox.config
        argv = effective_argv(config, image)
        tty = config.tty if isinstance(config.tty, bool) else image.tty
        return WorkloadSpec(
            sandbox_id=sandbox.id,
            key=sandbox.key,
            slot=sandbox.slot,
            image=image,
            volume=volume,
            hostname=hostname_of(sandbox.key),
            cpu=effective_cpu(config, self._defaults.cpu),
            memory_bytes=effective_memory_bytes(config, self._defaults.memory_mib),
            pids_max=self._defaults.pids_max,
            argv=argv,
            tty=tty and not is_keep_alive(argv),
            cwd=config.cwd or image.cwd or "/",
            env=self._environment(image, config),
            extra_hosts=tuple((name, _address(address)) for name, address in effective_extra_hosts(config)),
            mounts=await self._mounting.make(sandbox, volume),
        )

    def _environment(self, image: Image, config: SandboxConfig) -> dict[str, str]:
        return {
            **trust.ENVIRONMENT,
            GATEWAY_VARIABLE: self._defaults.gateway_url,
            **image.env,
            **(config.env or {}),
            **trust.FORCED_ENVIRONMENT,
        }

    def _with_alias_defaults(self, image: Image, name: str) -> Image:
        """An alias speaks for its image: its words replace the image's own, and a configuration's replace both."""
        alias = self._image_defaults.get(name)
        if alias is None:
            return image
        return msgspec.structs.replace(
            image,
            entrypoint=image.entrypoint if alias.entrypoint is None else alias.entrypoint,
            cmd=image.cmd if alias.entrypoint is None else (),
            cwd=alias.cwd or image.cwd,
            tty=image.tty if alias.tty is None else alias.tty,
            env={**image.env, **alias.env},
        )


def effective_argv(config: SandboxConfig, image: Image) -> tuple[str, ...]:
    """The configured entrypoint, which also clears the image's CMD; else the image's own (PROTOCOL 4.1)."""
    configured = effective_entrypoint(config)
    if configured is not None:
        return configured
    return (*image.entrypoint, *image.cmd)


def is_keep_alive(argv: tuple[str, ...]) -> bool:
    """An entrypoint that only keeps the sandbox alive gets no terminal (PROTOCOL 3.12)."""
    if not argv or argv[0].rsplit("/", 1)[-1] == "tail":
        return True
    shell = argv[0].rsplit("/", 1)[-1] in {"sh", "bash", "dash", "ash"}
    return shell and "-c" in argv[1:2] and len(argv) > 2 and argv[2].rstrip("; ").endswith("tail -f /dev/null")


def hostname_of(key: str) -> str:
    """A host name from a sandbox key: RFC 1123 letters, no dot or hyphen at an end."""
    name = key.replace("_", "-").replace(".", "-").strip("-")[:HOSTNAME_MAX].rstrip("-")
    return name.lower() or "sandbox"


def _address(address: str) -> str:
    return HOST_GATEWAY_ADDRESS if address == "host-gateway" else address.strip("[]")
