# ruff: noqa: S101 -- a test suite
"""Conformance of what a sandbox sees, shares and uses: root, mounts, network, resources."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from hiverd.contracts.errors import InvalidError
from hiverd.contracts.isolation import Isolation, Mount, Workload

from .isolation_harness import Harness, eventually, read_until, run, start
from .isolation_life import shell

_OPERATOR = 4242


class HostSuite:
    """Uses the fixtures `harness`, `isolation` (started), `workload` (as in `ExecSuite`) and pytest's `tmp_path`."""

    async def test_root_is_writable_and_kept_in_the_volume(self, harness: Harness, isolation: Isolation) -> None:
        async with harness.sandbox(isolation) as workload:
            script = "echo x > /root/file && mkdir -p /srv/a/b && echo y >> /etc/passwd && ls /root /srv/a"
            assert await run(workload, script) == (0, b"/root:\nfile\n\n/srv/a:\nb\n", b"")
            volumes = harness.folder / "volumes" / workload.sandbox_id / "root"
            assert any(path.name == "file" for path in volumes.rglob("file"))

    async def test_open_root_sees_what_the_workload_sees(self, workload: Workload) -> None:
        await run(workload, "echo content > /tmp/seen")
        root = workload.open_root()
        try:
            descriptor = os.open("tmp/seen", os.O_RDONLY, dir_fd=root)
            with os.fdopen(descriptor) as file:
                assert file.read() == "content\n"
            uid, gid = workload.root_ids
            made = os.open("tmp/made", os.O_WRONLY | os.O_CREAT, dir_fd=root)
            os.fchown(made, uid, gid)
            os.close(made)
        finally:
            os.close(root)
        assert (await run(workload, "stat -c '%u %g' /tmp/made")).stdout == b"0 0\n"

    async def test_names(self, harness: Harness, isolation: Isolation) -> None:
        async with harness.sandbox(isolation, extra_hosts=(("db.internal", "10.1.2.3"),)) as workload:
            output = await run(workload, "cat /etc/hostname /proc/sys/kernel/hostname; cat /etc/hosts")
            assert output.stdout.startswith(b"box\nbox\n")
            assert b"10.1.2.3\tdb.internal\n" in output.stdout
            assert (
                await run(workload, "echo '1.2.3.4 mine' >> /etc/hosts && sed -i s/mine/ours/ /etc/hosts")
            ).code == 0

    async def test_nothing_but_loopback(self, workload: Workload) -> None:
        assert (await run(workload, "ls /sys/class/net; cat /proc/net/route")).stdout.split()[0] == b"lo"
        assert len((await run(workload, "ls /sys/class/net")).stdout.split()) == 1

    async def test_listening_ports(self, workload: Workload) -> None:
        assert await workload.listening_ports() == frozenset()
        server = "import socket,time; a=socket.create_server(('127.0.0.1',4711));"
        server += "b=socket.create_server(('::1',4712),family=socket.AF_INET6); time.sleep(1000)"
        process = await start(workload, "python3", "-c", server)
        try:
            await eventually(workload.listening_ports, lambda ports: ports == {4711, 4712})
        finally:
            await process.close()
        await eventually(workload.listening_ports, lambda ports: not ports)

    async def test_usage(self, workload: Workload) -> None:
        before = await workload.usage()
        await run(workload, "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done")
        after = await workload.usage()
        assert after.cpu_seconds > before.cpu_seconds
        assert 0 < after.memory_bytes < 256 * 1024 * 1024

    async def test_memory_limit_kills_and_says_so(self, harness: Harness, isolation: Isolation) -> None:
        hog = shell("exec python3 -c 'x = bytearray(400 << 20)'")
        async with harness.sandbox(isolation, argv=hog, memory_bytes=64 << 20) as workload:
            ended = await asyncio.wait_for(workload.wait(), 60)
            assert (ended.exit_code, ended.out_of_memory) == (137, True)

    async def test_process_limit(self, harness: Harness, isolation: Isolation) -> None:
        async with harness.sandbox(isolation, pids_max=64) as workload:
            bomb = "i=0; while [ $i -lt 200 ]; do sleep 30 & i=$((i+1)); done; wait"
            process = await start(workload, bomb)
            await read_until(process.output(), b"fork")
            await process.close()
            assert (await run(workload, "echo alive")).stdout == b"alive\n"

    async def test_owned_mount(self, harness: Harness, isolation: Isolation, tmp_path: Path) -> None:
        folder = tmp_path / "owned"
        folder.mkdir(mode=0o755)
        async with harness.sandbox(isolation, mounts=(Mount("/workspace", str(folder)),)) as workload:
            assert (await run(workload, "stat -c %u /workspace; echo hi > /workspace/file")) == (0, b"0\n", b"")
            assert (folder / "file").read_text() == "hi\n"
            assert await workload.mounted_targets() == {"/workspace"}

    async def test_operators_mount_keeps_its_owner(
        self, harness: Harness, isolation: Isolation, tmp_path: Path
    ) -> None:
        folder = tmp_path / "operators"
        folder.mkdir(mode=0o755)
        (folder / "given").write_text("given\n")
        for path in (folder, folder / "given"):
            os.chown(path, _OPERATOR, _OPERATOR)
        (folder / "foreign").write_text("")
        mounts = (Mount("/data", str(folder), owned=False),)
        async with harness.sandbox(isolation, mounts=mounts) as workload:
            script = (
                "stat -c %u /data /data/given; cat /data/given; echo new > /data/made; mkdir /data/sub; rm /data/given"
            )
            assert await run(workload, script) == (0, b"0\n0\ngiven\n", b"")
            assert (folder / "made").stat().st_uid == _OPERATOR
            assert (folder / "sub").stat().st_gid == _OPERATOR
            assert not (folder / "given").exists()
            assert (folder.stat().st_uid, folder.stat().st_gid) == (_OPERATOR, _OPERATOR)

    async def test_read_only_mount(self, harness: Harness, isolation: Isolation, tmp_path: Path) -> None:
        for number, owned in enumerate((True, False)):
            folder = tmp_path / f"read-only-{number}"
            folder.mkdir(mode=0o755)
            mounts = (Mount("/data", str(folder), owned=owned, read_only=True),)
            async with harness.sandbox(isolation, mounts=mounts) as workload:
                output = await run(workload, "echo x > /data/file")
                assert output.code != 0
                assert b"ead-only" in output.stderr
                assert list(folder.iterdir()) == []

    async def test_nested_mounts(self, harness: Harness, isolation: Isolation, tmp_path: Path) -> None:
        outer, inner = tmp_path / "outer", tmp_path / "inner"
        outer.mkdir()
        inner.mkdir()
        mounts = (Mount("/workspace/deep/inner", str(inner)), Mount("/workspace", str(outer)))
        async with harness.sandbox(isolation, mounts=mounts) as workload:
            await run(workload, "echo x > /workspace/deep/inner/file; echo y > /workspace/file")
            assert (inner / "file").exists()
            assert (outer / "file").exists()
            assert await workload.mounted_targets() == {"/workspace", "/workspace/deep/inner"}

    async def test_mounts_come_and_go_while_it_runs(
        self, harness: Harness, isolation: Isolation, workload: Workload, tmp_path: Path
    ) -> None:
        folder = tmp_path / "late"
        folder.mkdir(mode=0o755)
        (folder / "file").write_text("late\n")
        mount = Mount("/new/place", str(folder), owned=False)
        await workload.add_mount(mount)
        assert (await run(workload, "cat /new/place/file; echo back > /new/place/reply")).stdout == b"late\n"
        assert (folder / "reply").read_text() == "back\n"
        assert await workload.mounted_targets() == {"/new/place"}
        # Moving the folder above a mount must not keep the mount from being taken away.
        assert (await run(workload, "mv /new /moved && cat /moved/place/file")).stdout == b"late\n"
        await workload.remove_mount("/new/place")
        assert await workload.mounted_targets() == frozenset()
        assert (await run(workload, "cat /moved/place/file")).code != 0
        await workload.remove_mount("/new/place")
        assert (folder / "file").exists()

    async def test_a_link_leads_no_mount_out(self, harness: Harness, workload: Workload, tmp_path: Path) -> None:
        folder = tmp_path / "linked"
        folder.mkdir(mode=0o755)
        (folder / "file").write_text("linked\n")
        await run(workload, f"mkdir -p /real; ln -s /real /link; ln -s ../../../../..{tmp_path} /escape")
        await workload.add_mount(Mount("/link/deep", str(folder)))
        assert (await run(workload, "cat /real/deep/file")).stdout == b"linked\n"
        await workload.remove_mount("/link/deep")
        assert (await run(workload, "ls /real/deep")).stdout == b""
        with contextlib.suppress(InvalidError):
            await workload.add_mount(Mount("/escape/inside", str(folder)))
        assert not (tmp_path / "inside").exists()
        await workload.remove_mount("/escape/inside")
        await run(workload, "ln -s /proc /sneaky")
        with pytest.raises(InvalidError):
            await workload.add_mount(Mount("/sneaky/sys", str(folder)))

    @pytest.mark.parametrize("target", ["/", "/proc", "/proc/self", "/sys/kernel", "/dev/shm", "relative"])  # noqa: S108
    async def test_no_mounts_over_the_systems_own(self, workload: Workload, tmp_path: Path, target: str) -> None:
        with pytest.raises(InvalidError):
            await workload.add_mount(Mount(target, str(tmp_path)))
