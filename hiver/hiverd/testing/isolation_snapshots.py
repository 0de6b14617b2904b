# ruff: noqa: S101 -- a test suite
"""Conformance of what snapshots need: pauses, changes to the root file system, a way into the namespaces."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path
from typing import Final

import pytest

from hiverd.contracts.errors import UnsupportedError
from hiverd.contracts.isolation import Isolation, Workload

from .isolation_harness import Harness, eventually, run, start

COUNT: Final = "while :; do echo x >> /tmp/count; done"


async def counted(workload: Workload) -> int:
    """How often a program of the workload has counted, seen without running anything in it."""
    root = workload.open_root()
    try:
        return os.stat("tmp/count", dir_fd=root).st_size
    except FileNotFoundError:
        return 0
    finally:
        os.close(root)


def pid_of(descriptor: int) -> int:
    """Of a pidfd."""
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pid:"))


class SnapshotSuite:
    """Uses the fixtures `harness` and `isolation` (started)."""

    async def test_nothing_runs_while_it_is_paused(self, harness: Harness, isolation: Isolation) -> None:
        async with harness.sandbox(isolation) as workload:
            process = await start(workload, COUNT)
            await eventually(lambda: counted(workload))
            try:
                processes = await workload.pause()
            except UnsupportedError:
                await process.close()
                pytest.skip("this plug-in cannot pause here")
            assert processes
            assert all(os.path.isdir(f"/proc/{pid}") for pid in processes)  # noqa: ASYNC240 -- no disk behind it
            before = await counted(workload)
            await asyncio.sleep(0.2)
            assert await counted(workload) == before
            await workload.resume()
            await workload.resume()
            await eventually(lambda: counted(workload), lambda now: now > before)
            await process.close()

    async def test_what_is_paused_ends_and_is_adopted_awake(self, harness: Harness, isolation: Isolation) -> None:
        image = await isolation.resolve_image(harness.image, lambda _: None)
        spec = harness.spec(image)
        async with harness.created(isolation, spec) as workload:
            await workload.begin()
            try:
                await workload.pause()
            except UnsupportedError:
                pytest.skip("this plug-in cannot pause here")
            adopted = await isolation.adopt(spec, workload.state)
            try:
                assert (await run(adopted, "echo awake")).stdout == b"awake\n"
                await adopted.pause()
                async with asyncio.timeout(10):
                    await adopted.stop(0)
            finally:
                await adopted.close()

    async def test_what_is_paused_can_be_destroyed(self, harness: Harness, isolation: Isolation) -> None:
        async with asyncio.timeout(30), harness.sandbox(isolation) as workload:
            try:
                await workload.pause()
            except UnsupportedError:
                pytest.skip("this plug-in cannot pause here")

    async def test_changes_to_the_root_file_system(self, harness: Harness, isolation: Isolation) -> None:
        image = await isolation.resolve_image(harness.image, lambda _: None)
        spec = harness.spec(image)
        async with harness.created(isolation, spec) as workload:
            await workload.begin()
            done = await run(workload, "echo mine > /changed; chown 7:8 /changed; rm /etc/passwd; ls -d /etc")
            assert done.code == 0, done
            state = workload.state
            for _ in ("while it runs", "when it has ended"):
                changes = await isolation.root_changes(spec, state)
                if changes is None:
                    pytest.skip("this plug-in cannot tell")
                changed = os.lstat(f"{changes.upper}/changed")
                assert (changed.st_uid - changes.first_id, changed.st_gid - changes.first_id) == (7, 8)
                deleted = os.lstat(f"{changes.upper}/etc/passwd")
                assert stat.S_ISCHR(deleted.st_mode)
                assert deleted.st_rdev == 0
                await workload.stop(0)

    async def test_a_process_of_its_namespaces(self, harness: Harness, isolation: Isolation) -> None:
        image = await isolation.resolve_image(harness.image, lambda _: None)
        async with harness.created(isolation, harness.spec(image)) as workload:
            descriptor = workload.open_process()
            try:
                pid = pid_of(descriptor)
                root = workload.open_root()
                there, here = os.stat(f"/proc/{pid}/root"), os.fstat(root)
                os.close(root)
                assert (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
                assert os.readlink(f"/proc/{pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
            finally:
                os.close(descriptor)
