"""Lives of sandboxes on Docker that end or go on without the server."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from hiver_backends.docker.documents import PASSING_PREFIX
from hiverd.contracts.errors import ConflictError, SandboxGoneError
from hiverd.testing.isolation_harness import eventually, has_gone, run
from hiverd.testing.isolation_life import joined, read_log, shell
from support.docker import Engine
from system.docker_support import DockerHarness, needs_docker

pytestmark = [pytest.mark.system, needs_docker]


@pytest.fixture
def harness(tmp_path: Path, docker_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[DockerHarness]:
    monkeypatch.setenv("DOCKER_HOST", docker_engine.host)
    harness = DockerHarness(tmp_path)
    yield harness
    harness.remove()


def docker(*argv: str) -> str:
    return subprocess.run(["docker", *argv], check=True, capture_output=True, text=True).stdout.strip()


def monitors(folder: Path) -> list[int]:
    """Processes with a path below a folder in their arguments."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            arguments = Path("/proc", name, "cmdline").read_bytes()
        except OSError:
            continue
        if os.fsencode(folder) in arguments:
            found.append(int(name))
    return found


async def test_an_entrypoint_may_end_while_no_server_runs(harness: DockerHarness) -> None:
    async with harness.started() as first:
        image = await first.resolve_image(harness.image, lambda _: None)
        spec = harness.spec(image, argv=shell("mkfifo /tmp/gate; read x < /tmp/gate; echo over; exit 6"))
        workload = await first.create(spec)
        await workload.begin()
        state = msgspec.json.decode(msgspec.json.encode(workload.state))
        await eventually(lambda: run(workload, "test -p /tmp/gate"), lambda output: output.code == 0)
        await workload.close()
    docker("exec", state["container_id"], "/bin/sh", "-c", "echo go > /tmp/gate")
    log = harness.context.data_dir / "sandboxes" / spec.sandbox_id / state["container_id"]

    async def recorded() -> bool:
        return log.exists()

    await eventually(recorded)
    async with harness.started() as second:
        adopted = await second.adopt(spec, state)
        assert (await asyncio.wait_for(adopted.wait(), 20)).exit_code == 6
        assert joined(await read_log(adopted)) == b"over\n"
        assert await has_gone(adopted)
        await adopted.close()
        await second.destroy(spec.sandbox_id, state)


@pytest.mark.parametrize("command", [("kill",), ("rm", "-f")])
async def test_what_somebody_ends_has_ended(harness: DockerHarness, command: tuple[str, ...]) -> None:
    async with harness.started() as isolation:
        image = await isolation.resolve_image(harness.image, lambda _: None)
        spec = harness.spec(image, argv=shell("echo up; sleep 1000"))
        async with harness.created(isolation, spec) as workload:
            await workload.begin()
            waiting = asyncio.create_task(workload.wait(), name="wait")
            docker(*command, str(workload.state["container_id"]))
            assert (await asyncio.wait_for(waiting, 20)).exit_code == 137
            assert joined(await read_log(workload)) == b"up\n"
            with pytest.raises(SandboxGoneError):
                await run(workload, "true")
            with pytest.raises(SandboxGoneError):
                await isolation.adopt(spec, workload.state)


async def test_nothing_is_left_on_the_host(harness: DockerHarness) -> None:
    async with harness.started() as isolation:
        image = await isolation.resolve_image(harness.image, lambda _: None)
        for tty in (False, True):
            spec = harness.spec(image, argv=shell("sleep 1000 & sleep 1000"), tty=tty)
            workload = await isolation.create(spec)
            await workload.begin()
            folder = harness.run_dir / "s" / spec.sandbox_id
            assert monitors(folder)
            assert spec.sandbox_id not in Path("/proc/self/mountinfo").read_text(), "the host has no mount of it"
            with pytest.raises(ConflictError):
                await isolation.create(spec)
            await workload.close()
            await isolation.destroy(spec.sandbox_id, None)
            assert monitors(folder) == []
            assert not folder.exists()
            assert not (harness.context.data_dir / "sandboxes" / spec.sandbox_id).exists()
    assert not list(Path("/run").glob(f"hiver-{harness.instance}*"))


async def test_a_create_that_is_given_up_leaves_nothing(harness: DockerHarness) -> None:
    async with harness.started() as isolation:
        image = await isolation.resolve_image(harness.image, lambda _: None)
        for delay_seconds in (0.0, 0.02, 0.05, 0.1, 0.15, 0.2):
            spec = harness.spec(image)
            creating = asyncio.create_task(isolation.create(spec), name="create")
            await asyncio.sleep(delay_seconds)
            creating.cancel()
            await asyncio.wait({creating})
            if not creating.cancelled():
                await creating.result().close()
            await isolation.destroy(spec.sandbox_id, None)
            assert spec.sandbox_id not in await isolation.list_owned()
            assert spec.sandbox_id not in Path("/proc/self/mountinfo").read_text()


async def test_the_trial_of_a_killed_server_is_swept(harness: DockerHarness) -> None:
    async with harness.started() as isolation:
        image = await isolation.resolve_image(harness.image, lambda _: None)
        spec = msgspec.structs.replace(harness.spec(image), sandbox_id=f"{PASSING_PREFIX}left")
        workload = await isolation.create(spec)
        await workload.close()
        assert await isolation.list_owned() == frozenset(), "no sandbox of which the core would have to know"
    assert harness.instance in docker("ps", "--all", "--format", "{{.Names}}")
    async with harness.started():
        assert harness.instance not in docker("ps", "--all", "--format", "{{.Names}}")


async def test_pruned_images_are_no_end(harness: DockerHarness) -> None:
    async with harness.started() as isolation:
        subprocess.run(["docker", "rmi", "-f", "hiver-empty:1"], check=False, capture_output=True)
        async with harness.sandbox(isolation) as workload:
            assert (await run(workload, "echo works")).stdout == b"works\n"
