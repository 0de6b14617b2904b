"""An Engine that maps user ids (`userns-remap`): root of a sandbox is nobody on the host."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import msgspec
import pytest

from hiverd.contracts.isolation import Isolation, Workload
from hiverd.testing.isolation_harness import run
from hiverd.testing.isolation_host import HostSuite
from hiverd.testing.isolation_life import joined, read_log, shell
from support.docker import FIRST_MAPPED_ID, IMAGE, Engine
from support.engines import running_or_skipped
from system.docker_support import DockerHarness, needs_docker

pytestmark = [pytest.mark.system, needs_docker]

OWNERS: Final = "id -u; stat -c %u:%g /bin/busybox .; echo by name > /dev/stdout; echo error > /dev/stderr; exit 3"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with running_or_skipped(Engine(f"remap-{os.getpid()}", userns_remap=True)) as engine:
        yield engine


@pytest.fixture
def harness(tmp_path: Path, engine: Engine) -> Iterator[DockerHarness]:
    harness = DockerHarness(tmp_path, host=engine.host)
    yield harness
    harness.remove()


@pytest.fixture
async def isolation(harness: DockerHarness) -> AsyncIterator[Isolation]:
    async with harness.started() as isolation:
        yield isolation
        assert await isolation.list_owned() == frozenset()


@pytest.fixture
async def workload(harness: DockerHarness, isolation: Isolation) -> AsyncIterator[Workload]:
    async with harness.sandbox(isolation) as workload:
        yield workload


async def test_an_entrypoint_of_an_image_of_the_engines(harness: DockerHarness, isolation: Isolation) -> None:
    (finding,) = [each for each in await isolation.probe() if each.name == "user namespaces"]
    assert finding.ok
    image = await isolation.resolve_image(IMAGE, lambda _: None)
    async with harness.created(isolation, harness.spec(image, argv=shell(OWNERS), cwd="/work")) as workload:
        assert Path("/proc", str(workload.state["pid"])).stat().st_uid == FIRST_MAPPED_ID
        await workload.begin()
        assert (await workload.wait()).exit_code == 3
        log = await read_log(workload)
        assert joined(log).splitlines() == [b"0", b"0:0", b"0:0", b"by name"]
        assert joined(log, "stderr") == b"error\n"


async def test_a_sandbox_outlives_its_server(harness: DockerHarness, engine: Engine) -> None:
    async with harness.started() as first:
        spec = harness.spec(await first.resolve_image(IMAGE, lambda _: None))
        workload = await first.create(spec)
        await workload.begin()
        made = await run(workload, "echo x > made; chown 7:8 made; stat -c %u:%g made; echo y >> /etc/passwd")
        assert made == (0, b"7:8\n", b"")
        state = msgspec.json.decode(msgspec.json.encode(workload.state))
        await workload.close()
    async with harness.started() as second:
        adopted = await second.adopt(spec, state)
        assert (await run(adopted, "cat made; rm made; id -u")).stdout == b"x\n0\n"
        await adopted.close()
        await second.destroy(spec.sandbox_id, state)
    assert engine.containers() == []


class TestHost(HostSuite):
    """What a sandbox and its host see of each other: files, mounts, limits."""
