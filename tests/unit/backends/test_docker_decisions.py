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

from hiver_backends.docker import credentials, documents, settings
from hiver_backends.docker.groups import ContainerCgroups
from hiver_backends.docker.images import empty_archive
from hiver_backends.docker.layers import overlay_folders
from hiver_backends.docker.probe import endpoint_kind, judged
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


class TestProbe:
    def test_kinds_of_address(self) -> None:
        assert [endpoint_kind(text) for text in ("unix:///s", "tcp://h:1", "https://h", "ssh://h")] == [
            "unix", "tcp", "tcp", "ssh"
        ]  # fmt: skip

    def test_consent_is_for_what_can_be_done_without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 0)

        def refused(info: dict[str, Any], pid: int, *accept: str) -> list[str]:
            findings = judged(settings.parse({"accept": accept}), info, VERSION, pid)
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
