"""The OCI runtime configuration (config.json) of a sandbox, and process documents for `exec`. No I/O."""

from __future__ import annotations

import re
import resource
from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct

from hiverd.contracts.isolation import ExecSpec, Mount, WorkloadSpec

INIT_PATH: Final = "/dev/.hiver-init"
"""Where process 1's program is mounted: on the sandbox's own /dev, so that the image stays as it is."""
DEFAULT_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

CAPABILITIES: Final = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
MASKED_PATHS: Final = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/sys/kernel/security",
)
READONLY_PATHS: Final = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_NAMESPACES: Final = ("pid", "ipc", "uts", "mount", "network", "cgroup")
_SHM: Final = "/dev/shm"  # noqa: S108 -- a mount point inside the sandbox
_CPU_PERIOD_US: Final = 100_000
MIN_PIDS: Final = 32
"""Below that, a runtime's own threads do not fit while it starts a command."""
OOM_SCORE_ADJ: Final = 500
_COMMAND_FILES: Final = 1024
"""PROTOCOL 3.11."""
_ENTRYPOINT_FILES: Final = 65_536


class Layout(Struct, frozen=True, kw_only=True):
    """Where a sandbox's parts are on this host."""

    rootfs: str
    init: str
    """Host path of the static init program."""
    cgroups_path: str
    host_id: int | None
    """First id of the sandbox's range; None: no user namespace."""
    unified_cgroups: bool
    swap_limit: bool
    seccomp: Mapping[str, Any] | None
    tty_session: bool
    """The entrypoint runs on a terminal in a session of its own, so process 1 only waits."""


def entry_arguments(argv: tuple[str, ...], *, tty_session: bool) -> list[str]:
    """Arguments of process 1: supervise the entrypoint, or just reap orphans."""
    if argv and not tty_session:
        return [INIT_PATH, "--", *argv]
    return [INIT_PATH, "-P"]


_EXEC_FAILURE: Final = re.compile(rb"^ERROR \(catatonit:\d+\): failed to exec pid1: (.*)\n\Z", re.MULTILINE)


def entry_exit_code(code: int, last_output: bytes) -> int:
    """The entrypoint's exit code as a shell would give it (PROTOCOL 0.8): the init program has 1 for all failures to
    run it, and says which on stderr, as the last thing there is."""
    failure = _EXEC_FAILURE.search(last_output)
    if code != 1 or failure is None:
        return code
    return 127 if b"No such file" in failure.group(1) else 126


def environment(spec: WorkloadSpec) -> dict[str, str]:
    """The sandbox's own environment: ours, then the image's, then the configured one."""
    base = {"PATH": DEFAULT_PATH, "HOME": "/root", "HOSTNAME": spec.hostname}
    if spec.tty and spec.argv:
        base |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    return base | spec.image.env | spec.env


def exec_process(spec: ExecSpec, workload: WorkloadSpec) -> dict[str, Any]:
    """The process document of a command run by `exec`."""
    terminal = {"TERM": "xterm-256color", "COLORTERM": "truecolor"} if spec.tty else {}
    env = terminal | environment(workload) | spec.env
    document = process(list(spec.argv), env, spec.cwd or workload.cwd or "/", terminal=spec.tty)
    document["rlimits"] = _rlimits(_COMMAND_FILES)
    return document


def process(argv: list[str], env: Mapping[str, str], cwd: str, *, terminal: bool) -> dict[str, Any]:
    """`process` of the OCI runtime specification, with a sandbox's privileges."""
    capabilities = list(CAPABILITIES)
    return {
        "terminal": terminal,
        "user": {"uid": 0, "gid": 0},
        "args": argv,
        "env": [f"{name}={value}" for name, value in env.items()],
        "cwd": cwd,
        "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
        "rlimits": _rlimits(_ENTRYPOINT_FILES),
        "noNewPrivileges": True,
        "oomScoreAdj": OOM_SCORE_ADJ,
    }


def configuration(spec: WorkloadSpec, layout: Layout) -> dict[str, Any]:
    """config.json as a whole. The sandbox's own mounts are already attached below the root when the runtime starts."""
    argv = entry_arguments(spec.argv, tty_session=layout.tty_session)
    return {
        "ociVersion": "1.0.2",
        "process": process(argv, environment(spec), spec.cwd or "/", terminal=False),
        "root": {"path": layout.rootfs, "readonly": False},
        "hostname": spec.hostname,
        "mounts": [*_system_mounts(layout), _bind_read_only(layout.init, INIT_PATH)],
        "linux": _linux(spec, layout),
    }


def _bind_read_only(source: str, target: str) -> dict[str, Any]:
    options = ["bind", "rprivate", "nosuid", "nodev", "ro"]
    return {"destination": target, "type": "bind", "source": source, "options": options}


def sorted_mounts(mounts: tuple[Mount, ...]) -> list[Mount]:
    """Parents before children, so that nothing hides what is mounted below it."""
    return sorted(mounts, key=lambda mount: mount.target.rstrip("/").count("/"))


def _linux(spec: WorkloadSpec, layout: Layout) -> dict[str, Any]:
    linux: dict[str, Any] = {
        "cgroupsPath": layout.cgroups_path,
        "namespaces": [{"type": kind} for kind in _NAMESPACES],
        "resources": _resources(spec, swap_limit=layout.swap_limit),
        "maskedPaths": list(MASKED_PATHS),
        "readonlyPaths": list(READONLY_PATHS),
        "rootfsPropagation": "rprivate",
    }
    if layout.host_id is not None:
        mapping = [{"containerID": 0, "hostID": layout.host_id, "size": 65536}]
        linux["namespaces"].append({"type": "user"})
        linux["uidMappings"] = linux["gidMappings"] = mapping
    if layout.seccomp is not None:
        linux["seccomp"] = dict(layout.seccomp)
    # Ping needs no raw socket where the kernel lets groups open ICMP ones; ports below 1024 are the sandbox's own.
    linux["sysctl"] = {"net.ipv4.ip_unprivileged_port_start": "0"}
    return linux


def _resources(spec: WorkloadSpec, *, swap_limit: bool) -> dict[str, Any]:
    memory = {"limit": spec.memory_bytes}
    if swap_limit:
        memory["swap"] = spec.memory_bytes
    return {
        "devices": [{"allow": False, "access": "rwm"}],
        "memory": memory,
        "cpu": {
            "shares": max(2, int(1024 * spec.cpu)),
            "quota": max(1000, int(_CPU_PERIOD_US * spec.cpu)),
            "period": _CPU_PERIOD_US,
        },
        "pids": {"limit": max(MIN_PIDS, spec.pids_max)},
    }


def _rlimits(files: int) -> list[dict[str, Any]]:
    # Soft and hard alike: a runtime written in Go raises a soft limit below the hard one for itself, and in some
    # versions, depending on timing, what it starts inherits that.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = files if hard == resource.RLIM_INFINITY else min(files, hard)
    return [
        {"type": "RLIMIT_NOFILE", "soft": files, "hard": files},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
    ]


def _mount(target: str, kind: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": kind, "options": list(options)}


def _system_mounts(layout: Layout) -> list[dict[str, Any]]:
    mounts = [
        _mount("/proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        _mount(_SHM, "tmpfs", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),
        _mount("/dev/mqueue", "mqueue", "nosuid", "noexec", "nodev"),
        _mount("/sys", "sysfs", "nosuid", "noexec", "nodev", "ro"),
    ]
    if layout.unified_cgroups:
        # Language runtimes size themselves by it. On version 1 it would be a dozen mounts more per sandbox.
        mounts.append(_mount("/sys/fs/cgroup", "cgroup", "nosuid", "noexec", "nodev", "ro"))
    return mounts
