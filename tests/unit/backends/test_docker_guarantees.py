"""What an Engine's own words say about our guarantees: documents as real engines answer them, one table."""

from __future__ import annotations

from typing import Any, Final

import pytest

from hiver_backends.docker import guarantees
from hiver_backends.docker.guarantees import EndpointKind, findings, local_root, losses, lost
from hiverd.contracts.isolation import Finding

DEBIAN: Final[dict[str, Any]] = {
    "OSType": "linux",
    "OperatingSystem": "Debian GNU/Linux 12 (bookworm)",
    "KernelVersion": "6.1.0-31-amd64",
    "Driver": "overlay2",
    "CgroupDriver": "systemd",
    "CgroupVersion": "2",
    "MemoryLimit": True,
    "PidsLimit": True,
    "CpuCfsQuota": True,
    "SecurityOptions": ["name=apparmor", "name=seccomp,profile=default", "name=cgroupns"],
}
VERSION: Final[dict[str, Any]] = {
    "Version": "20.10.24+dfsg1",
    "ApiVersion": "1.41",
    "MinAPIVersion": "1.12",
    "Components": [{"Name": "Engine", "Version": "20.10.24+dfsg1"}, {"Name": "containerd", "Version": "1.6.20"}],
}
PODMAN: Final[dict[str, Any]] = {
    "Version": "4.3.1",
    "ApiVersion": "1.41",
    "Components": [{"Name": "Podman Engine", "Version": "4.3.1"}, {"Name": "Conmon", "Version": "2.1.6"}],
}
DESKTOP: Final = {"OperatingSystem": "Docker Desktop", "KernelVersion": "6.10.14-linuxkit"}
ROOTLESS: Final = {"SecurityOptions": ["name=seccomp,profile=builtin", "name=rootless", "name=cgroupns"]}
OUTSIDE: Final = frozenset({"egress", "governed-mounts", "mount-changes", "file-events"})

Case = tuple[dict[str, Any], dict[str, Any], EndpointKind, bool, set[str], frozenset[str], bool]

CASES: Final[dict[str, Case]] = {
    # members of /info, of /version, endpoint, root there; names of losses, guarantees lost, fatal
    "root beside the engine": ({}, {}, "unix", True, set(), frozenset(), False),
    "newer engine": ({}, {"Version": "28.2.2", "ApiVersion": "1.50"}, "unix", True, set(), frozenset(), False),
    "remapped": (
        {"SecurityOptions": ["name=seccomp,profile=builtin", "name=userns"]},
        {},
        "unix",
        True,
        set(),
        frozenset(),
        False,
    ),
    "own profile": (
        {"SecurityOptions": ["name=seccomp,profile=/etc/docker/x.json"]},
        {},
        "unix",
        True,
        set(),
        frozenset(),
        False,
    ),
    "ordinary user": ({}, {}, "unix", False, {"privileges"}, OUTSIDE, True),
    "rootless": (ROOTLESS, {}, "unix", False, {"privileges", "rootless engine"}, OUTSIDE, True),
    "rootless, we are root": (ROOTLESS, {}, "unix", True, {"rootless engine"}, OUTSIDE, True),
    "rootless on cgroups v1": (
        {**ROOTLESS, "CgroupDriver": "none", "CgroupVersion": "1"},
        {},
        "unix",
        False,
        {"privileges", "rootless engine", "limits"},
        OUTSIDE | {"limits"},
        True,
    ),
    "podman": ({}, PODMAN, "unix", True, {"kind of engine"}, frozenset({"tested-engine"}), False),
    "tcp": ({}, {}, "tcp", False, {"engine's host"}, OUTSIDE, True),
    "ssh": ({}, {}, "ssh", False, {"engine's host"}, OUTSIDE, True),
    "desktop from outside": (DESKTOP, {}, "unix", False, {"engine's host"}, OUTSIDE, True),
    "desktop from Windows": (DESKTOP, {}, "npipe", False, {"engine's host"}, OUTSIDE, True),
    "desktop, beside the engine": (DESKTOP, {}, "unix", True, set(), frozenset(), False),
    "windows containers": ({"OSType": "windows"}, {}, "unix", True, {"containers"}, frozenset(), True),
    "old engine": ({}, {"ApiVersion": "1.40"}, "unix", True, {"API"}, frozenset(), True),
    "nonsense for a version": ({}, {"ApiVersion": "new"}, "unix", True, {"API"}, frozenset(), True),
    "no seccomp": (
        {"SecurityOptions": ["name=apparmor"]},
        {},
        "unix",
        True,
        {"system calls"},
        frozenset({"seccomp"}),
        False,
    ),
    "no security options": (
        {"SecurityOptions": None},
        {},
        "unix",
        True,
        {"system calls"},
        frozenset({"seccomp"}),
        False,
    ),
    "seccomp unconfined": (
        {"SecurityOptions": ["name=seccomp,profile=unconfined"]},
        {},
        "unix",
        True,
        {"system calls"},
        frozenset({"seccomp"}),
        False,
    ),
    "no memory limit": ({"MemoryLimit": False}, {}, "unix", True, {"limits"}, frozenset({"limits"}), False),
    "no pids limit": ({"PidsLimit": False}, {}, "unix", True, {"limits"}, frozenset({"limits"}), False),
    "no CPU limit": ({"CpuCfsQuota": False}, {}, "unix", True, {"limits"}, frozenset({"limits"}), False),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    result: Case = request.param
    return result


def _judge(case: Case, *accept: str) -> list[Finding]:
    info, version, endpoint, root, *_ = case
    return findings(DEBIAN | info, VERSION | version, endpoint, local_root=root, accept=accept)


def _starts(found: list[Finding]) -> bool:
    return all(finding.ok for finding in found if finding.required)


def test_losses(case: Case) -> None:
    info, version, endpoint, root, names, gone, fatal = case
    found = losses(DEBIAN | info, VERSION | version, endpoint, local_root=root)
    assert {loss.name for loss in found} == names
    assert lost(found) == gone
    assert any(loss.fatal for loss in found) is fatal


def test_nothing_that_is_lost_starts_without_consent(case: Case) -> None:
    assert _starts(_judge(case)) is not case[4]


def test_every_lost_guarantee_has_to_be_accepted_by_name(case: Case) -> None:
    gone, fatal = case[5], case[6]
    assert _starts(_judge(case, *gone)) is not fatal
    for one in gone:
        assert fatal or one in guarantees.ACCEPTABLE
        assert not _starts(_judge(case, *(gone - {one}))), one


def test_a_refusal_says_what_is_lost_and_what_to_do(case: Case) -> None:
    for finding in _judge(case):
        if finding.required and not finding.ok:
            assert finding.remedy
    missing = [finding for finding in _judge(case) if finding.required and not finding.ok]
    for name in case[5]:
        assert any(f"{name}: {guarantees.MEANINGS[name]}" in finding.detail for finding in missing)  # type: ignore[index]
        assert case[6] or any(f'"{name}"' in finding.remedy for finding in missing)


def test_an_accepted_loss_stays_visible() -> None:
    (finding,) = (found for found in _judge(CASES["podman"], "tested-engine") if found.name == "kind of engine")
    assert not finding.ok
    assert not finding.required
    assert "accepted" in finding.detail


def test_what_guards_from_outside_cannot_be_accepted_away() -> None:
    assert guarantees.unknown_names(OUTSIDE) == sorted(OUTSIDE)


def test_every_guarantee_has_a_meaning_and_no_other_name_is_taken() -> None:
    assert set(guarantees.MEANINGS) == set(guarantees.GUARANTEES)
    assert guarantees.unknown_names(guarantees.ACCEPTABLE) == []
    assert guarantees.unknown_names(["limits", "all", "open"]) == ["all", "open"]


def test_a_good_engine_says_what_it_is() -> None:
    title = _judge(CASES["root beside the engine"])[0]
    assert title.ok
    assert title.detail == "Docker Engine 20.10.24+dfsg1 (API 1.41), overlay2, cgroups v2 by systemd"


def test_who_root_inside_is() -> None:
    found = _judge(CASES["root beside the engine"])
    assert found[-1].name == "user namespaces"
    assert not found[-1].required


def test_an_empty_document_promises_nothing() -> None:
    assert not _starts(findings({}, {}, "unix", local_root=True, accept=guarantees.GUARANTEES))


@pytest.mark.parametrize(
    ("endpoint", "euid", "kernel", "pid", "expected"),
    [
        ("unix", 0, "6.1.0-31-amd64", 411, True),
        ("unix", 1000, "6.1.0-31-amd64", 411, False),
        ("unix", 0, "6.10.14-linuxkit", 411, False),  # a proxy in front of a virtual machine
        ("unix", 0, "6.1.0-31-amd64", 0, False),  # in another PID namespace
        ("tcp", 0, "6.1.0-31-amd64", 411, False),
    ],
)
def test_root_beside_the_engine(endpoint: EndpointKind, euid: int, kernel: str, pid: int, expected: bool) -> None:
    assert local_root(DEBIAN, endpoint, euid=euid, kernel_release=kernel, engine_pid=pid) is expected


@pytest.mark.parametrize("mapped", [False, True])
def test_whose_root_a_sandboxs_root_is(mapped: bool) -> None:
    options = ["name=seccomp,profile=builtin", *(["name=userns"] if mapped else [])]
    (found,) = [
        each
        for each in findings(DEBIAN | {"SecurityOptions": options}, VERSION, "unix", local_root=True)
        if each.name == "user namespaces"
    ]
    assert (found.ok, found.required, bool(found.remedy)) == (mapped, False, not mapped)
