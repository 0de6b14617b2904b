"""Which of our guarantees an Engine can keep. No I/O: judged from what it says about itself.

The documents are those of `GET /info` and `GET /version` of the Docker Engine API (1.41 and later). What is lost is
lost aloud: `findings` names it, and unless the operator has accepted each lost guarantee by name (`[docker] accept`),
the plug-in does not start. What guards a sandbox from outside cannot be accepted away, `egress` first of all: there the
plug-in never starts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, Literal, get_args

from msgspec import Struct

from hiverd.contracts.isolation import Finding

EndpointKind = Literal["unix", "tcp", "ssh", "npipe"]
Guarantee = Literal["egress", "governed-mounts", "mount-changes", "file-events", "limits", "seccomp", "tested-engine"]

GUARANTEES: Final[tuple[Guarantee, ...]] = get_args(Guarantee)
ACCEPTABLE: Final[tuple[Guarantee, ...]] = ("limits", "seccomp", "tested-engine")
"""The names that `[docker] accept` takes."""

MEANINGS: Final[Mapping[Guarantee, str]] = {
    "egress": "traffic is judged and recorded outside the sandbox",
    "governed-mounts": "mounts with rules, and remote ones",
    "mount-changes": "mounts change in a running sandbox",
    "file-events": "every access to a mount is an event",
    "limits": "bounds on CPU, memory and processes",
    "seccomp": "system calls that no workload needs are refused",
    "tested-engine": "all tests of this project run on this kind of engine",
}

MINIMUM_API: Final = (1, 41)
"""Docker Engine 20.10."""

_FROM_OUTSIDE: Final[tuple[Guarantee, ...]] = ("egress", "governed-mounts", "mount-changes", "file-events")
"""What takes root on the Engine's own host: these reach into a container's namespaces from outside."""
_USER_NAMESPACES: Final = "user namespaces"
_OUT_OF_REACH: Final = "whose files, processes and namespaces are out of reach"
_BESIDE: Final = "run hiver serve on the engine's own host, or there in the container of build/container"


class Loss(Struct, frozen=True):
    """Something about an Engine that costs guarantees."""

    name: str
    """As the finding is called."""
    detail: str
    remedy: str
    guarantees: tuple[Guarantee, ...] = ()
    fatal: bool = False
    """No consent helps: nothing would work."""


def losses(
    info: Mapping[str, Any],
    version: Mapping[str, Any],
    endpoint: EndpointKind,
    *,
    local_root: bool,
    engine_uid: int = 0,
) -> list[Loss]:
    """Everything that this Engine costs, the fatal first. Members that a document lacks count as not offered.

    `local_root`: this process is root on the host (the kernel) on which the Engine runs its containers. `engine_uid`:
    the user who holds its socket.
    """
    found = [
        _kernel(info),
        _api(version),
        _distance(info, endpoint, local_root),
        _privileges(info, endpoint, local_root),
        _rootless(info, engine_uid if local_root else 0),
        _engine(version),
        _limits(info),
        _seccomp(info),
    ]
    present = [loss for loss in found if loss is not None]
    return sorted(present, key=lambda loss: not loss.fatal)


def lost(found: Collection[Loss]) -> frozenset[Guarantee]:
    """The guarantees that are gone."""
    return frozenset(guarantee for loss in found for guarantee in loss.guarantees)


def unknown_names(accept: Collection[str]) -> list[str]:
    """What in `[docker] accept` names no guarantee that one can do without."""
    return sorted(set(accept) - set(ACCEPTABLE))


def findings(
    info: Mapping[str, Any],
    version: Mapping[str, Any],
    endpoint: EndpointKind,
    *,
    local_root: bool,
    engine_uid: int = 0,
    accept: Collection[str] = (),
) -> list[Finding]:
    """The same as findings. One that is `required` and not `ok` is to stop the plug-in from starting."""
    found = losses(info, version, endpoint, local_root=local_root, engine_uid=engine_uid)
    results = [_finding(loss, frozenset(accept)) for loss in found]
    if not any(finding.required for finding in results):
        results.insert(0, Finding("engine", ok=True, detail=_title(info, version)))
    results.append(_user_namespaces(info))
    return results


def _user_namespaces(info: Mapping[str, Any]) -> Finding:
    if "userns" in _options(info):
        detail = "the engine maps user ids: root of a sandbox is nobody on this host, the same nobody in all sandboxes"
        return Finding(_USER_NAMESPACES, ok=True, detail=detail, required=False)
    return Finding(
        _USER_NAMESPACES,
        ok=False,
        detail="not used: root of a sandbox has this host's root ids, without its privileges",
        required=False,
        remedy='"userns-remap" in the engine\'s daemon.json; or container_backend = "oci", which gives each its own',
    )


def local_root(
    info: Mapping[str, Any], endpoint: EndpointKind, *, euid: int, kernel_release: str, engine_pid: int
) -> bool:
    """Whether this process is root where the containers run.

    `engine_pid` is the socket's peer (SO_PEERCRED); 0 if that process cannot be seen from here, as behind a virtual
    machine's proxy or in another PID namespace. An Engine of another kernel is another host, whatever the socket says.
    """
    return endpoint == "unix" and euid == 0 and engine_pid > 0 and info.get("KernelVersion") == kernel_release


def _finding(loss: Loss, accepted: frozenset[str]) -> Finding:
    meanings = "; ".join(f"{name}: {MEANINGS[name]}" for name in loss.guarantees)
    detail = f"{loss.detail}; lost: {meanings}" if meanings else loss.detail
    if loss.fatal:
        return Finding(loss.name, ok=False, detail=detail, remedy=loss.remedy)
    missing = [name for name in loss.guarantees if name not in accepted]
    if not missing:
        detail = f"{detail}; accepted by [docker] accept"
        return Finding(loss.name, ok=False, detail=detail, required=False, remedy=loss.remedy)
    names = ", ".join(f'"{name}"' for name in loss.guarantees)
    remedy = f"{loss.remedy}; or go without, by accept = [{names}] below [docker]"
    return Finding(loss.name, ok=False, detail=detail, remedy=remedy)


def _title(info: Mapping[str, Any], version: Mapping[str, Any]) -> str:
    """`Docker Engine 20.10.24 (API 1.41), overlay2, cgroups v1 by cgroupfs`, as far as the documents say so."""
    groups = f"cgroups v{info.get('CgroupVersion', '?')} by {info.get('CgroupDriver', '?')}"
    name = "Podman" if is_podman(version) else "Docker Engine"
    engine = f"{name} {version.get('Version', '?')} (API {version.get('ApiVersion', '?')})"
    return f"{engine}, {info.get('Driver', '?')}, {groups}"


def _kernel(info: Mapping[str, Any]) -> Loss | None:
    if info.get("OSType", "linux") == "linux":
        return None
    return Loss("containers", "the engine runs Windows containers", "switch the engine to Linux containers", fatal=True)


def _api(version: Mapping[str, Any]) -> Loss | None:
    text = str(version.get("ApiVersion", ""))
    if _numbers(text) >= MINIMUM_API:
        return None
    return Loss(
        "API",
        f"the engine speaks version {text or 'unknown'} of the API",
        "install Docker Engine 20.10 or newer",
        fatal=True,
    )


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(".")
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else ()


def _distance(info: Mapping[str, Any], endpoint: EndpointKind, local_root: bool) -> Loss | None:
    """Where the Engine is on another host, bind mounts mean its folders, not ours."""
    if endpoint in {"tcp", "ssh"}:
        where = {"tcp": "over TCP", "ssh": "over SSH"}[endpoint]
        detail = f"the engine is reached {where}, so it counts as one on another host, {_OUT_OF_REACH}"
        return Loss("engine's host", detail, f"name its socket (unix:///...), and {_BESIDE}", _FROM_OUTSIDE, fatal=True)
    if endpoint == "npipe" or (_is_desktop(info) and not local_root):
        detail = f"Docker Desktop runs its containers in a virtual machine, {_OUT_OF_REACH}"
        return Loss(
            "engine's host",
            detail,
            "run hiver serve beside them, in the container of build/container",
            _FROM_OUTSIDE,
            fatal=True,
        )
    return None


def _is_desktop(info: Mapping[str, Any]) -> bool:
    return str(info.get("OperatingSystem", "")).startswith("Docker Desktop")


def _privileges(info: Mapping[str, Any], endpoint: EndpointKind, local_root: bool) -> Loss | None:
    if local_root or endpoint != "unix" or _is_desktop(info):
        return None
    detail = "not root on the host on which the engine runs its containers"
    return Loss("privileges", detail, f"sudo hiver serve ...; or {_BESIDE}", _FROM_OUTSIDE, fatal=True)


def _options(info: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """`["name=seccomp,profile=default"]` -> `{"seccomp": {"profile": "default"}}`."""
    found: dict[str, dict[str, str]] = {}
    for text in info.get("SecurityOptions") or ():
        pairs = dict(part.partition("=")[::2] for part in str(text).split(","))
        found[pairs.pop("name", "")] = pairs
    return found


def _rootless(info: Mapping[str, Any], engine_uid: int) -> Loss | None:
    """The Engine is an ordinary user there: our folders are closed to it, and its mounts are not ours to change.

    Podman does not say so of itself, but the owner of its socket tells; and root must not believe what an ordinary user
    says about containers.
    """
    if "rootless" not in _options(info) and not engine_uid:
        return None
    who = f"as user {engine_uid}" if engine_uid else "without root"
    return Loss(
        "rootless engine",
        f"the engine runs {who}: it can mount nothing of this server's folders",
        "use an engine that runs as root",
        _FROM_OUTSIDE,
        fatal=True,
    )


def is_podman(version: Mapping[str, Any]) -> bool:
    """By the component `Podman Engine` of its service; Docker's is called `Engine`."""
    names = [str(component.get("Name", "")) for component in version.get("Components") or ()]
    return any("podman" in name.lower() for name in names)


def _engine(version: Mapping[str, Any]) -> Loss | None:
    if not is_podman(version):
        return None
    return Loss(
        "kind of engine",
        f"Podman {version.get('Version', '')} speaks Docker's API in its own way".replace("  ", " "),
        'use Docker Engine, or container_backend = "oci", which needs no daemon',
        ("tested-engine",),
    )


def _limits(info: Mapping[str, Any]) -> Loss | None:
    wanted = {"memory": "MemoryLimit", "CPU": "CpuCfsQuota", "processes": "PidsLimit"}
    missing = [what for what, member in wanted.items() if not info.get(member)]
    if info.get("CgroupDriver") == "none":
        missing = list(wanted)
    if not missing:
        return None
    return Loss(
        "limits",
        f"the engine cannot bound {' and '.join(missing)}",
        "cgroups v2, or the controllers memory, cpu and pids mounted, make them possible",
        ("limits",),
    )


def has_seccomp(info: Mapping[str, Any]) -> bool:
    """Whether containers can have a system call filter at all. An Engine without refuses those that are to."""
    return "seccomp" in _options(info)


def _seccomp(info: Mapping[str, Any]) -> Loss | None:
    seccomp = _options(info).get("seccomp")
    if seccomp is not None and seccomp.get("profile") != "unconfined":
        return None
    how = "is set to run containers without" if seccomp is not None else "has no"
    return Loss(
        "system calls",
        f"the engine {how} seccomp filter",
        'a kernel with CONFIG_SECCOMP_FILTER, and no seccomp-profile "unconfined" in the engine\'s daemon.json',
        ("seccomp",),
    )
