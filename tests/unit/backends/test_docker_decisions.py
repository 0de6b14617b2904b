"""What the plug-in docker decides without doing: settings, bodies of requests, credentials, layers."""

from __future__ import annotations

import base64
import io
import json
import os
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest

from hiver_backends.docker import below, confinement, credentials, documents, podman, settings
from hiver_backends.docker.groups import ContainerCgroups
from hiver_backends.docker.images import empty_archive
from hiver_backends.docker.layers import is_root_of, overlay_folders
from hiver_backends.docker.probe import Peer, endpoint_kind, judged
from hiver_backends.linux import bundle, bundles, seccomp
from hiverd.contracts.errors import InvalidError
from hiverd.contracts.isolation import Image, WorkloadSpec

INFO: dict[str, Any] = {
    "OSType": "linux", "KernelVersion": os.uname().release, "MemoryLimit": True, "CpuCfsQuota": True,
    "PidsLimit": True, "SecurityOptions": ["name=seccomp,profile=default"],
}  # fmt: skip
VERSION: dict[str, Any] = {"ApiVersion": "1.41", "Version": "20.10.24"}


def spec(**changes: Any) -> WorkloadSpec:
    values: dict[str, Any] = {
        "sandbox_id": "id", "key": "key", "slot": 0, "image": Image("i", "h", env={"A": "image"}),
        "volume": Path("/volume"), "hostname": "box", "cpu": 0.25, "memory_bytes": 1 << 28, "pids_max": 100,
        "argv": ("program",), "tty": False, "cwd": "", "env": {"TOKEN": "s3cr3t"},
    }  # fmt: skip
    return WorkloadSpec(**(values | changes))


def layout(**changes: Any) -> documents.Layout:
    values: dict[str, Any] = {
        "instance": "abcd1234", "image": "sha256:1", "init": "/usr/bin/init", "runtime": "", "swap_limit": True,
        "seccomp": seccomp.default_profile(), "ipv6": True,
    }  # fmt: skip
    return documents.Layout(**(values | changes))


class TestSettings:
    def test_defaults(self) -> None:
        assert settings.parse({}) == settings.Settings()

    @pytest.mark.parametrize(
        ("options", "field"),
        [
            ({"hots": ""}, "docker.hots"),
            ({"host": "/var/run/docker.sock"}, "docker.host"),
            ({"log_max_bytes": 1}, "docker.log_max_bytes"),
            ({"timeout_seconds": 0}, "docker.timeout_seconds"),
            ({"parallelism": -1}, "docker.parallelism"),
            ({"seccomp": "relative"}, "docker.seccomp"),
            ({"image_roots": ["relative"]}, "docker.image_roots"),
            ({"accept": ["everything"]}, "docker.accept"),
            ({"host": 1}, "docker"),
        ],
    )
    def test_refused(self, options: dict[str, Any], field: str) -> None:
        with pytest.raises(InvalidError) as caught:
            settings.parse(options)
        assert caught.value.field == field

    def test_where_the_engine_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("DOCKER_HOST", raising=False)
        assert settings.endpoint(settings.parse({})) == "unix:///var/run/docker.sock"
        monkeypatch.setenv("DOCKER_HOST", "tcp://there:2376")
        assert settings.endpoint(settings.parse({})) == "tcp://there:2376"
        assert settings.endpoint(settings.parse({"host": "unix:///mine"})) == "unix:///mine"


class TestContainer:
    def test_holds_neither_program_nor_environment(self) -> None:
        body = documents.container(spec(), layout())
        assert (body["Entrypoint"], body["Cmd"]) == ([bundle.INIT_PATH], ["-P"])
        assert "s3cr3t" not in json.dumps(body)
        assert "program" not in body["Cmd"]
        assert body["Healthcheck"] == {"Test": ["NONE"]}

    def test_is_hardened(self) -> None:
        host = documents.container(spec(), layout())["HostConfig"]
        assert (host["NetworkMode"], host["IpcMode"], host["CgroupnsMode"]) == ("none", "private", "private")
        assert host["CapDrop"] == ["ALL"]
        assert not {"CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_SYS_ADMIN", "CAP_MKNOD"} & set(host["CapAdd"])
        assert host["Privileged"] is False
        assert host["SecurityOpt"][0] == "no-new-privileges:true"
        assert json.loads(host["SecurityOpt"][1].removeprefix("seccomp=")) == seccomp.default_profile()
        assert set(bundle.MASKED_PATHS) == set(host["MaskedPaths"])
        assert host["Binds"] == [f"/usr/bin/init:{bundle.INIT_PATH}:ro"]

    def test_limits(self) -> None:
        host = documents.container(spec(pids_max=4, cpu=64), layout())["HostConfig"]
        assert (host["CpuQuota"], host["CpuPeriod"]) == (6_400_000, 100_000)
        assert host["PidsLimit"] == bundle.MIN_PIDS
        assert host["Memory"] == host["MemorySwap"] == 1 << 28
        assert "MemorySwap" not in documents.container(spec(), layout(swap_limit=False))["HostConfig"]

    def test_identity(self) -> None:
        assert documents.container(spec(), layout())["Labels"] == {
            "hiver.instance": "abcd1234", "hiver.sandbox": "id", "hiver.key": "key"
        }  # fmt: skip
        assert documents.container_name("abcd1234", "id") == "hiver-abcd1234-id"

    def test_what_depends_on_the_host(self) -> None:
        with_ipv6 = documents.container(spec(), layout())["HostConfig"]
        without = documents.container(spec(), layout(ipv6=False, runtime="crun"))["HostConfig"]
        assert "net.ipv6.conf.all.disable_ipv6" in with_ipv6["Sysctls"]
        assert "net.ipv6.conf.all.disable_ipv6" not in without["Sysctls"]
        assert "Runtime" not in with_ipv6
        assert without["Runtime"] == "crun"


class TestCredentials:
    def test_from_the_file(self) -> None:
        auth = base64.b64encode(b"me:pass:word").decode()
        config = {"auths": {"https://r.example:5000": {"auth": auth}, "t.example": {"identitytoken": "token"}}}
        assert credentials.stored(config, "r.example:5000") == {
            "username": "me", "password": "pass:word", "serveraddress": "https://r.example:5000"
        }  # fmt: skip
        assert credentials.stored(config, "t.example") == {"identitytoken": "token", "serveraddress": "t.example"}
        assert credentials.stored(config, "other.example") is None
        assert credentials.stored({"auths": {"x": {"auth": "%"}}}, "x") is None

    def test_helpers_come_first(self) -> None:
        config = {"credsStore": "pass", "credHelpers": {"r.example": "vault"}}
        assert credentials.helper_for(config, "r.example") == "docker-credential-vault"
        assert credentials.helper_for(config, "other.example") == "docker-credential-pass"
        assert credentials.helper_for({}, "r.example") is None

    async def test_a_helper_is_asked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        helper = tmp_path / "docker-credential-fake"
        helper.write_text('#!/bin/sh\nread server\necho "{\\"Username\\": \\"$1 $server\\", \\"Secret\\": \\"s\\"}"\n')
        helper.chmod(helper.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
        (tmp_path / "config.json").write_text(json.dumps({"credHelpers": {"r.example": "fake", "x.example": "none"}}))
        found = await credentials.find("r.example")
        assert found == {"username": "get r.example", "password": "s", "serveraddress": "r.example"}
        assert await credentials.find("x.example") is None
        (tmp_path / "config.json").write_text("not JSON")
        assert await credentials.find("r.example") is None


class TestLayers:
    def test_of_an_overlay_without_the_engines_own(self, tmp_path: Path) -> None:
        folders = [tmp_path / name for name in ("init", "top", "bottom")]
        for folder in folders:
            folder.mkdir()
        driver = {"Name": "overlay2", "Data": {"LowerDir": ":".join(map(str, folders))}}
        assert overlay_folders({"GraphDriver": driver}) == folders[1:]
        folders[2].rmdir()
        assert overlay_folders({"GraphDriver": driver}) == []

    def test_of_other_stores_none_are_known(self) -> None:
        assert overlay_folders({"GraphDriver": {"Name": "btrfs", "Data": None}}) == []
        assert overlay_folders({"GraphDriver": None}) == []
        assert overlay_folders({}) == []
        long = ":".join(f"/{number:0100d}" for number in range(40))
        assert overlay_folders({"GraphDriver": {"Name": "overlay2", "Data": {"LowerDir": long}}}) == []


def test_only_what_a_process_has_as_its_root_is_its_root(tmp_path: Path) -> None:
    """An Engine may have mounted it in a mount namespace of its own: then the folder is here, and empty."""
    (tmp_path / "link").symlink_to("/")
    assert is_root_of(os.getpid(), Path("/"))
    for folder in (tmp_path, tmp_path / "link", tmp_path / "absent"):
        assert not is_root_of(os.getpid(), folder)
    assert not is_root_of(2**22 + 1, Path("/"))


class TestPodman:
    """Its own form of a request, and the runtime below it."""

    def test_what_it_would_pass_over_it_gets_in_its_own_form(self) -> None:
        ours = documents.container(spec(), layout())
        theirs = podman.container(ours, Path("/data/seccomp.json"))
        host = theirs.pop("HostConfig")
        options = host.pop("SecurityOpt")
        assert options[0] == "no-new-privileges:true"
        assert options[1] == "seccomp=/data/seccomp.json"
        assert options[2] == "mask=" + ":".join(bundle.MASKED_PATHS)
        assert len(options) == 3
        assert {limit["Name"] for limit in host.pop("Ulimits")} == {"nofile", "nproc"}
        same = dict(ours["HostConfig"])
        assert same.pop("SecurityOpt")[1].startswith("seccomp={")
        assert same.pop("MaskedPaths")
        assert host == same
        assert theirs == {name: value for name, value in ours.items() if name != "HostConfig"}

    def test_an_engine_without_filters_is_asked_for_none(self) -> None:
        theirs = podman.container(documents.container(spec(), layout(seccomp=None)), Path("/data/seccomp.json"))
        assert not [option for option in theirs["HostConfig"]["SecurityOpt"] if "seccomp" in option]

    WORDS = ("/usr/bin/conmon", "--api-version", "1", "-c", "abc", "-u", "abc", "-r", "/usr/bin/crun", "-b", "/bundle")

    @pytest.mark.parametrize(
        ("more", "environment", "root"),
        [
            ((), {}, "/run/crun"),
            ((), {"XDG_RUNTIME_DIR": "/run/user/0"}, "/run/user/0/crun"),
            (("--runtime-arg", "--root=/a"), {"XDG_RUNTIME_DIR": "/x"}, "/a"),
            (("--runtime-arg=--root", "--runtime-arg", "/b", "-l", "none"), {}, "/b"),
            (("--runtime-arg", "--log", "--runtime-arg=/log", "--exit-command", "x", "--root", "/no"), {}, "/run/crun"),
            (
                ("--exit-command", "/usr/bin/podman", "--exit-command-arg", "-r", "-b", "/other", "-c", "x"),
                {},
                "/run/crun",
            ),
        ],
    )
    def test_conmon_knows_the_runtime(self, more: tuple[str, ...], environment: dict[str, str], root: str) -> None:
        found = below.from_conmon([*self.WORDS, *more, ""], environment, "abc")
        assert found == below.Below(program="/usr/bin/crun", state_dir=root, bundle="/bundle")

    def test_runc_does_not_look_at_the_environment(self) -> None:
        words = ["/usr/sbin/runc" if word.endswith("crun") else word for word in self.WORDS]
        assert below.from_conmon(words, {"XDG_RUNTIME_DIR": "/x"}, "abc").state_dir == "/run/runc"

    def test_another_containers_conmon_is_refused(self) -> None:
        with pytest.raises(ValueError, match="the monitor of abc"):
            below.from_conmon(self.WORDS, {}, "abd")
        with pytest.raises(KeyError):
            below.from_conmon(["conmon"], {}, "abc")


class TestConfinement:
    """What a container lacks of what was asked for."""

    MOUNTS = b"""\
60 50 0:40 / / rw,relatime - overlay overlay rw
61 60 0:41 / /proc rw,nosuid - proc proc rw
62 61 0:41 /sys /proc/sys ro,nosuid - proc proc rw
63 61 0:42 /null /proc/keys rw,nosuid - tmpfs tmpfs rw
64 61 0:41 /bus /proc/bus rw - proc proc rw
"""

    def test_mounts(self) -> None:
        assert confinement.judged_mounts(self.MOUNTS, ["/proc/keys"], ["/proc/sys"]) == []
        lacks = confinement.judged_mounts(
            self.MOUNTS, ["/proc/keys", "/proc/kcore"], ["/proc/sys", "/proc/bus", "/proc/fs"]
        )
        assert lacks == ["/proc/kcore is not hidden", "/proc/bus can be written to", "/proc/fs can be written to"]

    def test_a_process_without_bonds(self) -> None:
        lacks = confinement.missing(os.getpid(), seccomp=True)
        assert "/proc/keys is not hidden" in lacks or not Path("/proc/keys").exists()
        assert "/proc/sys can be written to" in lacks
        status = Path("/proc/self/status").read_text()
        assert ("programs may gain privileges" in lacks) is ("NoNewPrivs:\t0" in status)
        assert ("system calls are not filtered" in lacks) is ("Seccomp:\t2" not in status)
        assert "system calls are not filtered" not in confinement.missing(os.getpid(), seccomp=False)

    def test_a_process_that_has_ended(self) -> None:
        with pytest.raises(OSError, match="No such"):
            confinement.missing(2**22 + 1, seccomp=True)


class TestProbe:
    def test_kinds_of_address(self) -> None:
        kinds = {
            "unix:///s": "unix",
            "tcp://h:1": "tcp",
            "https://h": "tcp",
            "h:1": "tcp",
            "ssh://h": "ssh",
            "npipe:////./pipe/docker_engine": "npipe",
        }
        assert {text: endpoint_kind(text) for text in kinds} == kinds

    def test_the_owner_of_the_socket_tells_an_engine_without_root(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Podman says nothing of it."""
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        findings = judged(settings.parse({"accept": ["limits"]}), INFO, VERSION, Peer(pid=1, uid=1000))
        (found,) = [finding for finding in findings if finding.required and not finding.ok]
        assert found.name == "rootless engine"
        assert "runs as user 1000" in found.detail
        assert "egress: " in found.detail

    def test_consent_is_for_what_can_be_done_without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 0)

        def refused(info: dict[str, Any], pid: int, *accept: str) -> list[str]:
            findings = judged(settings.parse({"accept": accept}), info, VERSION, Peer(pid=pid))
            return [finding.name for finding in findings if finding.required and not finding.ok]

        unlimited = INFO | {"PidsLimit": False}
        assert refused(INFO, 1) == []
        assert refused(unlimited, 1) == ["limits"]
        assert refused(unlimited, 1, "limits") == []
        assert refused(INFO, 0) == ["privileges"]
        for name in ("egress", "governed-mounts", "mount-changes", "file-events"):
            with pytest.raises(InvalidError, match="cannot be done without"):
                settings.parse({"accept": [name]})


def test_the_empty_image_is_always_the_same() -> None:
    assert empty_archive() == empty_archive()
    with tarfile.open(fileobj=io.BytesIO(empty_archive())) as archive:
        manifest = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
    assert manifest == [{"Config": "config.json", "RepoTags": ["hiver-empty:1"], "Layers": ["layer.tar"]}]


def test_bundles_in_both_forms() -> None:
    digest = {"config": {"digest": "sha256:ab"}}
    assert bundles.configuration_paths(digest)[0] == "/mnt/blobs/sha256/ab"
    assert bundles.configuration_paths([{"Config": "blobs/x.json"}])[-1] == "/mnt/blobs/x.json"
    for odd in ([], {}, "text"):
        with pytest.raises((LookupError, TypeError)):
            bundles.configuration_paths(odd)


def test_groups_are_those_of_process_1() -> None:
    groups = ContainerCgroups("abcd1234")
    assert not groups.contains("id", os.getpid())
    assert not groups.contains_any(os.getpid())
    with pytest.raises(ProcessLookupError):
        groups.register("id", 2**22 + 1)
    assert groups.path("id") == "/hiver-abcd1234/id"
