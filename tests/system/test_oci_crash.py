"""A server killed at any moment leaves nothing that `destroy` does not remove; nothing leaks in normal life either."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hiver_backends.linux import syscalls
from hiver_backends.linux.execs import Execs
from hiverd.contracts.errors import SandboxGoneError
from hiverd.contracts.isolation import WorkloadSpec
from hiverd.testing.isolation_harness import eventually, run
from support.leaks import left_to_init
from system.oci_support import OciHarness, needs_oci

pytestmark = [pytest.mark.system, needs_oci]

ROOT = Path(__file__).resolve().parents[2]

CHILD = """
import asyncio, json, sys
from pathlib import Path
import msgspec
from system.oci_support import OciHarness
from hiverd.contracts.isolation import WorkloadSpec
from hiverd.testing.isolation_harness import run, start

async def main():
    harness = OciHarness(Path(sys.argv[1]))
    spec = msgspec.json.decode(sys.argv[2], type=WorkloadSpec, dec_hook=lambda kind, text: kind(text))
    isolation = harness.build()
    await isolation.start()
    print("started", flush=True)
    workload = await isolation.create(spec)
    print(json.dumps(workload.state), flush=True)
    await workload.begin()
    print("begun", flush=True)
    while True:
        await run(workload, "echo x; sleep 0.01 & true")

asyncio.run(main())
"""


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[OciHarness]:
    harness = OciHarness(tmp_path)
    yield harness
    harness.remove()


def spawn(harness: OciHarness, spec: WorkloadSpec) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(str(ROOT / name) for name in ("hiver", "backends", "tests"))
    argv = [sys.executable, "-c", CHILD, str(harness.folder), msgspec.json.encode(spec, enc_hook=str).decode()]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path})


def traces(spec: WorkloadSpec, harness: OciHarness) -> list[str]:
    """Processes, mounts, control groups and files with the sandbox's id."""
    marker = spec.sandbox_id.encode()
    found = [f"mount {line!r}" for line in Path("/proc/self/mountinfo").read_bytes().splitlines() if marker in line]
    for entry in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "cgroup") if not left_to_init(entry) else ():
            try:
                if marker in (entry / name).read_bytes() and int(entry.name) != os.getpid():
                    found.append(f"process {entry.name} {(entry / 'cmdline').read_bytes()!r}")
            except OSError:
                continue
    for pattern in ("hiver-*", "*/hiver-*"):
        found += [str(path) for path in Path("/sys/fs/cgroup").glob(f"{pattern}/{spec.sandbox_id}")]
    for folder in (harness.run_dir, harness.folder / "data", Path("/run", f"hiver-{harness.instance}")):
        found += [str(path) for path in folder.rglob(f"*{spec.sandbox_id}*")]
    return found


@pytest.mark.parametrize("seed", range(12))
async def test_killed_at_a_random_moment_of_create(harness: OciHarness, seed: int) -> None:
    async with harness.started() as isolation:
        image = await isolation.resolve_image("host", lambda _: None)
    spec = harness.spec(image, argv=("/bin/sh", "-c", "while :; do sleep 0.01; done"))
    child = spawn(harness, spec)
    assert child.stdout is not None
    assert child.stdout.readline() == b"started\n"
    # Creating takes some 40 ms, then come begin and execs: a span over all of them.
    await asyncio.sleep(random.Random(seed).uniform(0, 0.12))
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    async with harness.started() as isolation:
        left = traces(spec, harness)
        owned = await isolation.list_owned()
        assert not left or spec.sandbox_id in owned, left
        await isolation.destroy(spec.sandbox_id, None)
        assert spec.sandbox_id not in await isolation.list_owned()
        assert await eventually(lambda: _look(spec, harness), lambda left: not left) == []
        assert not list((harness.run_dir / "x").glob("*.json")), "process documents hold the environment"


async def _look(spec: WorkloadSpec, harness: OciHarness) -> list[str]:
    return traces(spec, harness)


async def test_a_killed_servers_sandbox_is_adopted_by_another_process(harness: OciHarness) -> None:
    async with harness.started() as isolation:
        image = await isolation.resolve_image("host", lambda _: None)
    spec = harness.spec(image, argv=("/bin/sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done"))
    child = spawn(harness, spec)
    assert child.stdout is not None
    assert child.stdout.readline() == b"started\n"
    state: dict[str, Any] = json.loads(child.stdout.readline())
    assert child.stdout.readline() == b"begun\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    async with harness.started() as isolation:
        workload = await isolation.adopt(spec, state)
        assert (await run(workload, "echo here")).stdout == b"here\n"
        seen = b""
        async for chunk in workload.entrypoint_output(None):
            seen += chunk.data
            if seen.count(b"\n") > 40:
                break
        numbers = [int(line) for line in seen.split(b"\n")[:-1]]
        assert numbers == list(range(1, len(numbers) + 1)), "output went on without a gap while no server ran"
        os.kill(state["pid"], signal.SIGKILL)
        assert (await workload.wait()).exit_code == 137
        with pytest.raises(SandboxGoneError):
            await isolation.adopt(spec, state)
        await workload.close()
        await isolation.destroy(spec.sandbox_id, state)
        assert traces(spec, harness) == []


async def test_a_trial_of_a_killed_server_is_swept(harness: OciHarness) -> None:
    """Killed while it probed: the server left a mount, a control group and a running trial sandbox."""
    mounts = Path("/run", f"hiver-{harness.instance}")
    path = os.pathsep.join(str(ROOT / name) for name in ("hiver", "backends", "tests"))
    code = "import asyncio, sys; from pathlib import Path; from system.oci_support import OciHarness;"
    code += "asyncio.run(OciHarness(Path(sys.argv[1])).build().probe())"
    left: list[Path] = []
    for delay_seconds in (0.05, 0.1, 0.2, 0.3, 0.4):
        (harness.folder / "data" / "probe.json").unlink(missing_ok=True)
        child = subprocess.Popen([sys.executable, "-c", code, harness.folder], env={**os.environ, "PYTHONPATH": path})
        while not list(mounts.glob("probe-*/rootfs")) and child.poll() is None:
            await asyncio.sleep(0.001)
        await asyncio.sleep(delay_seconds)
        child.kill()
        child.wait()
        left += mounts.glob("probe-*")
    assert left, "killed too late each time to leave anything"
    async with harness.started() as isolation:
        assert await isolation.list_owned() == frozenset()
        assert list(mounts.glob("probe-*")) == []
        for pattern in (f"hiver-{harness.instance}", f"*/hiver-{harness.instance}"):
            assert list(Path("/sys/fs/cgroup").glob(f"{pattern}/probe-*")) == []
        assert str(mounts).encode() not in Path("/proc/self/mountinfo").read_bytes()


async def test_a_reused_pid_is_never_touched(harness: OciHarness) -> None:
    async with harness.started() as isolation:
        image = await isolation.resolve_image("host", lambda _: None)
        spec = harness.spec(image)
        workload = await isolation.create(spec)
        state = workload.state
        await workload.close()
        with subprocess.Popen(["sleep", "1000"]) as bystander:
            with pytest.raises(SandboxGoneError):
                await isolation.adopt(spec, {**state, "pid": bystander.pid})
            await isolation.destroy(spec.sandbox_id, {**state, "pid": bystander.pid})
            assert bystander.poll() is None
            bystander.kill()


async def test_cancelled_create_leaves_nothing(harness: OciHarness) -> None:
    async with harness.started() as isolation:
        image = await isolation.resolve_image("host", lambda _: None)
        for delay_seconds in (0, 0.002, 0.01, 0.02, 0.03, 0.05):
            spec = harness.spec(image)
            creating = asyncio.create_task(isolation.create(spec), name="create")
            await asyncio.sleep(delay_seconds)
            creating.cancel()
            done = (await asyncio.gather(creating, return_exceptions=True))[0]
            if not isinstance(done, BaseException):
                await done.close()
            await isolation.destroy(spec.sandbox_id, None)
            assert await eventually(functools.partial(_look, spec, harness), lambda left: not left) == []


async def test_cancelled_exec_leaves_nothing(harness: OciHarness) -> None:
    async with harness.started() as isolation, harness.sandbox(isolation) as workload:
        for delay_seconds in (0, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03):
            command = asyncio.create_task(run(workload, "sleep", "7781"), name="exec")
            await asyncio.sleep(delay_seconds)
            command.cancel()
            await asyncio.gather(command, return_exceptions=True)
        look = "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c 'sleep 778[1]' || true"
        await eventually(lambda: run(workload, look), lambda output: output.stdout.strip() == b"0")
        began_monotonic = time.monotonic()
        await workload.stop(0)
        assert time.monotonic() - began_monotonic < 5


async def test_nothing_leaks_over_a_hundred_sandboxes(harness: OciHarness) -> None:
    async with harness.started() as isolation:
        image = await isolation.resolve_image("host", lambda _: None)
        slots = iter(range(1000))

        async def cycle(slot: int) -> None:
            async with harness.created(isolation, harness.spec(image, slot=slot)) as workload:
                await workload.begin()
                assert (await run(workload, "echo hi")).stdout == b"hi\n"
                reading = asyncio.create_task(_drain(workload), name="log")
                await workload.stop(0)
                await asyncio.wait_for(reading, 10)

        await asyncio.gather(*(cycle(next(slots)) for _ in range(10)))
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            used = [slot % 10 for slot in range(10)]
            await asyncio.gather(*(cycle(slot) for slot in used))
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= before
        assert await isolation.list_owned() == frozenset()
        await eventually(_zombies, lambda zombies: not zombies)


async def _drain(workload: Any) -> None:
    async for _ in workload.entrypoint_output(None):
        pass


async def _zombies() -> list[str]:
    return [line for line in map(_stat, Path("/proc").glob("[0-9]*/stat")) if _is_our_zombie(line)]


def _stat(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _is_our_zombie(line: str) -> bool:
    fields = line.rsplit(")", 1)[1].split() if line else ["", "0"]
    return fields[0] == "Z" and int(fields[1]) == os.getpid()


async def test_a_start_copes_with_what_a_dead_servers_runtime_still_writes(harness: OciHarness) -> None:
    """Such a runtime's file may come between the emptying of the folder and its making."""
    folder = harness.run_dir / "x"
    folder.mkdir(parents=True)
    stop = threading.Event()
    writer = threading.Thread(target=_write_until, args=(folder, stop))
    writer.start()
    try:
        for _ in range(20):
            async with harness.started():
                pass
    finally:
        stop.set()
        writer.join()


async def test_a_failed_start_leaves_the_process_as_it_was(harness: OciHarness, monkeypatch: Any) -> None:
    before = syscalls.set_child_subreaper(False)
    syscalls.set_child_subreaper(before)
    isolation = harness.build()
    monkeypatch.setattr(Execs, "prepare", _fail)
    with pytest.raises(OSError, match="no room"):
        await isolation.start()
    after = syscalls.set_child_subreaper(before)
    assert after == before


def _write_until(folder: Path, stop: threading.Event) -> None:
    number = 0
    while not stop.is_set():
        number += 1
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
            (folder / f"dead-{number}").write_text("1")


def _fail(_: object) -> None:
    raise OSError("no room")
