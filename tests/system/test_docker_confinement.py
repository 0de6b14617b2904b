"""What confines a sandbox on Docker: commands that bypass the Engine get no more than those that pass it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from hiver_backends.docker import DockerIsolation
from hiver_backends.docker.guarantees import ACCEPTABLE
from hiverd.contracts.errors import InvalidError, UnavailableError
from hiverd.contracts.isolation import Isolation, Workload
from hiverd.testing.isolation_harness import run
from hiverd.testing.isolation_life import joined, read_log, shell
from support.docker import Engine
from system.docker_support import DockerHarness, needs_docker

pytestmark = [pytest.mark.system, needs_docker]

STATUS = "grep -E '^(Cap|Seccomp:|NoNewPrivs)' /proc/self/status; cat /proc/self/cgroup /proc/self/oom_score_adj"


@pytest.fixture
def harness(tmp_path: Path, docker_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[DockerHarness]:
    monkeypatch.setenv("DOCKER_HOST", docker_engine.host)
    harness = DockerHarness(tmp_path)
    yield harness
    harness.remove()


@pytest.fixture
async def isolation(harness: DockerHarness) -> AsyncIterator[Isolation]:
    async with harness.started() as isolation:
        yield isolation


@pytest.fixture
async def workload(harness: DockerHarness, isolation: Isolation) -> AsyncIterator[Workload]:
    async with harness.sandbox(isolation, env={"SECRET": "s3cr3t"}) as workload:
        yield workload


def through_the_engine(workload: Workload, *argv: str) -> str:
    """A command as `docker exec` runs it."""
    words = ["docker", "exec", str(workload.state["container_id"]), *argv]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def groups(pid: int) -> set[str]:
    return {line.split(":", 2)[2] for line in Path("/proc", str(pid), "cgroup").read_text().splitlines()}


async def test_commands_have_no_more_than_the_engines(workload: Workload) -> None:
    ours = (await run(workload, STATUS)).stdout.decode()
    theirs = through_the_engine(workload, "/bin/sh", "-c", STATUS)

    def effective(text: str) -> list[str]:
        return re.findall(r"^(?:CapEff|CapBnd|CapPrm|Seccomp|NoNewPrivs):.*$", text, re.MULTILINE)

    assert effective(ours) == effective(theirs)
    assert "Seccomp:\t2" in ours
    assert "NoNewPrivs:\t1" in ours
    capabilities = int(re.search(r"CapBnd:\s*(\w+)", ours)[1], 16)  # type: ignore[index]
    for number, name in ((12, "NET_ADMIN"), (13, "NET_RAW"), (21, "SYS_ADMIN"), (19, "SYS_PTRACE"), (27, "MKNOD")):
        assert not capabilities >> number & 1, name


async def test_commands_stay_in_the_containers_groups(workload: Workload) -> None:
    process = await run(workload, "sleep 7781 >/dev/null 2>&1 & echo $!")
    assert process.code == 0
    inside = groups(int(workload.state["pid"]))
    host_pids = [
        int(name)
        for name in os.listdir("/proc")
        if name.isdecimal() and _command_line(int(name)) == b"sleep\x007781\x00" and groups(int(name)) & inside - {"/"}
    ]
    assert len(host_pids) == 1
    assert groups(host_pids[0]) == inside


def _command_line(pid: int) -> bytes:
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes()
    except OSError:
        return b""


async def test_entrypoints_are_confined_alike(harness: DockerHarness, isolation: Isolation) -> None:
    async with harness.sandbox(isolation, argv=shell(STATUS)) as workload:
        log = joined(await read_log(workload)).decode()
    async with harness.sandbox(isolation) as other:
        output = (await run(other, STATUS)).stdout.decode()
    assert log == output


async def test_the_root_is_ours_and_the_engines_is_gone(workload: Workload) -> None:
    mounts = (await run(workload, "cat /proc/self/mounts")).stdout.decode().splitlines()
    assert not [line for line in mounts if "hiver-root" in line or "docker" in line.split("lowerdir")[0]]
    roots = [line for line in mounts if line.split()[1] == "/"]
    assert len(roots) == 1
    assert "upperdir" in roots[0]
    # An operator's own `docker exec` sees the same root.
    await run(workload, "echo seen > /srv/mark")
    assert through_the_engine(workload, "/bin/cat", "/srv/mark") == "seen\n"


async def test_what_the_engine_hides_stays_hidden(workload: Workload) -> None:
    script = "for f in /proc/kcore /proc/keys /proc/timer_list; do head -c 1 $f | wc -c; done; ls /sys/firmware | wc -l"
    assert (await run(workload, script)).stdout.split() == [b"0", b"0", b"0", b"0"]
    for script in ("echo 1 > /proc/sys/kernel/panic", "echo b > /proc/sysrq-trigger", "echo x > /sys/kernel/x"):
        assert (await run(workload, script)).code != 0


async def test_the_engine_is_not_told_secrets(workload: Workload) -> None:
    inspect = subprocess.run(
        ["docker", "inspect", str(workload.state["container_id"])], check=True, capture_output=True, text=True
    )
    assert "s3cr3t" not in inspect.stdout
    assert (await run(workload, "echo $SECRET")).stdout == b"s3cr3t\n"


async def test_no_network_of_the_engines(workload: Workload) -> None:
    output = await run(workload, "cat /proc/net/dev; cat /etc/resolv.conf")
    assert re.findall(rb"^ *(\S+):", output.stdout, re.MULTILINE) == [b"lo"]
    assert b"nameserver 11.0.0.1" in output.stdout


@pytest.mark.parametrize("host", ["tcp://127.0.0.1:1", "ssh://nobody@127.0.0.1", "unix:///nowhere.sock"])
async def test_an_engine_out_of_reach_is_refused(tmp_path: Path, host: str) -> None:
    harness = DockerHarness(tmp_path, host=host)
    isolation = harness.build()
    try:
        findings = await isolation.probe()
        assert [finding for finding in findings if finding.required and not finding.ok]
        with pytest.raises(UnavailableError):
            await isolation.start()
    finally:
        harness.remove()


async def test_consent_does_not_open_a_remote_engine(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="'egress' cannot be done without"):
        DockerHarness(tmp_path, host="tcp://127.0.0.1:1", accept=["egress"]).build()
    accepted: dict[str, Any] = {"host": "tcp://127.0.0.1:1", "accept": list(ACCEPTABLE)}
    harness = DockerHarness(tmp_path, **accepted)
    isolation: DockerIsolation = harness.build()
    try:
        with pytest.raises(UnavailableError):
            await isolation.start()
    finally:
        harness.remove()
