"""Podman in Docker's place: refused without consent, and with it the same sandboxes.

`HIVER_TEST_PODMAN=1` runs the whole conformance suite on it as well, which takes a minute and a half.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from hiver_backends.linux import bundle
from hiverd.testing.isolation import IsolationSuite
from hiverd.testing.isolation_harness import run
from support.docker_api import IMAGE
from support.docker_podman import Podman
from support.engines import running_or_skipped
from support.leaks import marks_of, wait_until_clean
from support.sandboxes import Box
from support.server import DEFAULT_CONFIG, HIVER, Backend, Server, ServerFailed, clean_environment, keys_of
from support.waiting import until, until_async
from system.docker_support import DockerHarness

pytestmark = pytest.mark.system

CONSENT: Final = 'accept = ["tested-engine"]\n'
STATUS: Final = "grep -E '^(CapBnd|CapEff|Seccomp|NoNewPrivs):' /proc/self/status"


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    with running_or_skipped(Podman(str(os.getpid()))) as podman:
        yield podman


def _server(folder: Path, podman: Podman, more: str = "", **options: Any) -> Server:
    config = f'{DEFAULT_CONFIG}[docker]\nhost = "{podman.host}"\n{more}'
    return Server(folder, config=config, backend=Backend("docker"), **options)


@pytest.fixture
def server(tmp_path: Path, podman: Podman) -> Iterator[Server]:
    """One whose sandboxes outlive it. Nothing is left in the end."""
    server = _server(tmp_path, podman, CONSENT, ephemeral=False)
    server.start()
    yield server
    server.stop()
    server.ephemeral = True
    server.start()
    server.stop()
    wait_until_clean(marks_of(server.data_dir), seconds=60)


@pytest.fixture
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        yield client


def test_without_consent_it_is_refused_and_the_doctor_says_the_same(tmp_path: Path, podman: Podman) -> None:
    server = _server(tmp_path, podman)
    with pytest.raises(ServerFailed) as caught:
        server.start()
    found = re.search(r"kind of engine: (Podman [\d.]+ .*); lost: (tested-engine: .*) -> (.*)", str(caught.value))
    assert found, caught.value
    assert 'accept = ["tested-engine"]' in found[3]
    argv = [HIVER, "doctor", "--config", str(server.config_path)]
    doctor = subprocess.run(
        argv, check=False, capture_output=True, text=True, timeout=60, env=clean_environment()
    ).stdout
    assert re.search(rf"MISSING +kind of engine +{re.escape(f'{found[1]}; lost: {found[2]}')}\n", doctor), doctor
    assert f"-> {found[3]}\n" in doctor


async def test_a_life_with_consent(podman: Podman, server: Server, http: httpx.AsyncClient) -> None:
    of_its_own_images = await Box.create(http, "other", image=IMAGE)
    assert await of_its_own_images.out("id -u; cat /proc/1/comm; ls /bin/busybox") == "0\n.hiver-init\n/bin/busybox\n"
    box = await Box.create(http, "k", egress=[{"host": "example.com", "access": "deny"}])
    answer = await http.post(f"{box.base}/file/workspace/note", content=b"from outside")
    assert answer.status_code in {200, 201, 204}, answer.text
    assert await box.out("cat /workspace/note") == "from outside"
    await box.run("curl -s http://example.com/")

    async def denied() -> bool:
        return any(event["type"] == "egress.request" and event["access"] == "denied" for event in await box.events())

    await until_async(denied, seconds=10, what="the request that was denied is on record")
    await box.out("sleep 100000 >/dev/null 2>&1 & echo $! > /workspace/pid")
    server.kill()
    podman.stop_service()
    podman.start_service()
    server.start()
    assert await box.out("kill -0 $(cat /workspace/pid) && echo alive") == "alive\n"
    await box.remove()
    wait_until_clean([box.id], seconds=30)
    # And somebody else removes a container.
    (container,) = [str(each["Id"]) for each in podman.containers() if of_its_own_images.id in str(each)]
    podman.call("DELETE", f"/containers/{container}?force=true")
    until(lambda: keys_of(server) == [], seconds=20, what="the sandbox ended")
    wait_until_clean([of_its_own_images.id], seconds=30)


class _Harness:
    @pytest.fixture
    def harness(self, tmp_path: Path, podman: Podman) -> Iterator[DockerHarness]:
        harness = DockerHarness(tmp_path, host=podman.host, accept=["tested-engine"])
        yield harness
        harness.remove()


class TestConfinement(_Harness):
    async def test_what_was_asked_for_is_in_force(self, harness: DockerHarness) -> None:
        """Podman passes over members of a request that it does not know."""
        async with harness.started() as isolation, harness.sandbox(isolation, pids_max=64) as workload:
            status = (await run(workload, STATUS)).stdout.decode()
            assert "Seccomp:\t2\n" in status
            assert "NoNewPrivs:\t1\n" in status
            process_1 = Path("/proc", str(workload.state["pid"]))
            of_process_1 = (process_1 / "status").read_text()
            for line in status.splitlines():
                assert line in of_process_1
            mounts = {line.split()[4] for line in (process_1 / "mountinfo").read_text().splitlines()}
            existing = {path for path in bundle.MASKED_PATHS if (process_1 / "root" / path[1:]).exists()}
            assert "/proc/interrupts" in existing
            assert existing <= mounts
            assert (await run(workload, "echo 1 > /proc/sys/kernel/panic")).code != 0
            forks = "exec 2>&1; for i in $(seq 100); do sleep 60 >/dev/null 2>&1 & done"
            assert b"fork" in (await run(workload, forks)).stdout


if os.environ.get("HIVER_TEST_PODMAN"):

    class TestPodman(_Harness, IsolationSuite):
        """All of it."""
