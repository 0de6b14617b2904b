"""What we ask of the Engine for a sandbox: the body of POST /containers/create. No I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct

from hiver_backends.linux import bundle
from hiverd.contracts.isolation import WorkloadSpec

INSTANCE_LABEL: Final = "hiver.instance"
SANDBOX_LABEL: Final = "hiver.sandbox"
KEY_LABEL: Final = "hiver.key"
PASSING_PREFIX: Final = "probe-"
"""Of the ids of containers that are no sandbox and go at once. Only the next start removes them after a crash."""

_CPU_PERIOD_US: Final = 100_000
_SHM_BYTES: Final = 64 << 20


class Layout(Struct, frozen=True, kw_only=True):
    """What does not come from the sandbox's own specification."""

    instance: str
    image: str
    """Id of the Engine's image."""
    init: str
    """Host path of the static init program."""
    runtime: str
    seccomp: Mapping[str, Any] | None
    swap_limit: bool
    ipv6: bool
    """Whether this kernel has it."""


def container_name(instance: str, sandbox_id: str) -> str:
    """Unique on the Engine, and a person's way to find a sandbox in `docker ps`."""
    return f"hiver-{instance}-{sandbox_id}"


def container(spec: WorkloadSpec, layout: Layout) -> dict[str, Any]:
    """A container whose only program is the init, which waits and reaps.

    The entrypoint is not in it, nor is the environment, which may hold secrets: who may speak to the Engine could read
    them there. Both come later, when the sandbox begins.
    """
    return {
        "Image": layout.image,
        "Entrypoint": [bundle.INIT_PATH],
        "Cmd": ["-P"],
        "User": "0:0",
        "WorkingDir": "/",
        "Hostname": spec.hostname,
        "Tty": False,
        "OpenStdin": False,
        # Docker would run an image's own health check as a command in the sandbox, even before it begins.
        "Healthcheck": {"Test": ["NONE"]},
        "Labels": {INSTANCE_LABEL: layout.instance, SANDBOX_LABEL: spec.sandbox_id, KEY_LABEL: spec.key},
        "HostConfig": _host_config(spec, layout),
    }


def _host_config(spec: WorkloadSpec, layout: Layout) -> dict[str, Any]:
    config: dict[str, Any] = {
        "AutoRemove": False,
        "Binds": [f"{layout.init}:{bundle.INIT_PATH}:ro"],
        "CapAdd": list(bundle.CAPABILITIES),
        "CapDrop": ["ALL"],
        "CgroupnsMode": "private",
        "CpuPeriod": _CPU_PERIOD_US,
        "CpuQuota": max(1000, int(_CPU_PERIOD_US * spec.cpu)),
        "CpuShares": max(2, int(1024 * spec.cpu)),
        "Init": False,
        "IpcMode": "private",
        "LogConfig": {"Type": "none", "Config": {}},
        "MaskedPaths": list(bundle.MASKED_PATHS),
        "Memory": spec.memory_bytes,
        "NetworkMode": "none",
        "OomScoreAdj": bundle.OOM_SCORE_ADJ,
        "PidsLimit": max(bundle.MIN_PIDS, spec.pids_max),
        "Privileged": False,
        "ReadonlyPaths": list(bundle.READONLY_PATHS),
        "RestartPolicy": {"Name": "no"},
        "SecurityOpt": _security(layout.seccomp),
        "ShmSize": _SHM_BYTES,
        "Sysctls": _sysctls(ipv6=layout.ipv6),
    }
    if layout.swap_limit:
        config["MemorySwap"] = spec.memory_bytes
    if layout.runtime:
        config["Runtime"] = layout.runtime
    return config


def _security(seccomp: Mapping[str, Any] | None) -> list[str]:
    options = ["no-new-privileges:true"]
    if seccomp is not None:
        options.append(f"seccomp={json.dumps(seccomp)}")
    return options


def _sysctls(*, ipv6: bool) -> dict[str, str]:
    # Docker lets everybody make ping sockets; nobody is the kernel's own default, written so that the first is greater.
    sysctls = {"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "1 0"}
    if ipv6:
        # Docker switches it off without a network; servers on ::1 are as good as any.
        sysctls["net.ipv6.conf.all.disable_ipv6"] = "0"
    return sysctls
