"""What hostile code inside a sandbox tries, on the real plug-in with the image `host`."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hiver_backends.linux import bundle
from hiver_backends.oci import OciIsolation
from hiverd.contracts.isolation import Isolation, Workload
from hiverd.testing.isolation_harness import run
from system.oci_support import OciHarness, needs_oci

pytestmark = [pytest.mark.system, needs_oci]

CAPABILITY_NUMBERS = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_FOWNER": 3,
    "CAP_FSETID": 4,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_SETPCAP": 8,
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_SYS_CHROOT": 18,
    "CAP_SETFCAP": 31,
}
"""capability(7), <linux/capability.h>: all that a sandbox may ever have."""
ALLOWED = sum(1 << number for number in CAPABILITY_NUMBERS.values())


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[OciHarness]:
    harness = OciHarness(tmp_path)
    yield harness
    harness.remove()


@pytest.fixture
async def isolation(harness: OciHarness) -> AsyncIterator[Isolation]:
    async with harness.started() as isolation:
        yield isolation
        assert await isolation.list_owned() == frozenset()


@pytest.fixture
async def workload(harness: OciHarness, isolation: Isolation) -> AsyncIterator[Workload]:
    async with harness.sandbox(isolation, env={"TOKEN": "very-secret"}) as workload:
        yield workload


async def python(workload: Workload, code: str) -> bytes:
    output = await run(workload, "python3", "-c", code)
    assert output.code == 0, output.stderr.decode()
    return output.stdout.strip()


SYSCALL = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    result = libc.syscall(number, *arguments)
    return ctypes.get_errno() if result == -1 else 0
print(call(*{arguments}))
"""


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("unshare user", "(272, 0x10000000)"),
        ("unshare mount", "(272, 0x20000)"),
        ("clone into a user namespace", "(56, 0x10000000 | 17, 0, 0, 0, 0)"),
        ("clone into a network namespace", "(56, 0x40000000 | 17, 0, 0, 0, 0)"),
        ("mount", "(165, b'none', b'/mnt', b'tmpfs', 0, 0)"),
        ("umount", "(166, b'/usr', 2)"),
        ("pivot_root", "(155, b'/', b'/')"),
        ("setns", "(308, 0, 0)"),
        ("fsopen", "(430, b'tmpfs', 0)"),
        ("open_tree", "(428, -100, b'/', 1)"),
        ("move_mount", "(429, -100, b'/', -100, b'/mnt', 0)"),
        ("bpf", "(321, 0, 0, 0)"),
        ("perf_event_open", "(298, 0, 0, -1, -1, 0)"),
        ("userfaultfd", "(323, 0)"),
        ("io_uring_setup", "(425, 8, 0)"),
        ("add_key", "(248, b'user', b'a', b'b', 1, -3)"),
        ("keyctl", "(250, 0, -3, 0)"),
        ("open_by_handle_at", "(304, -100, 0, 0)"),
        ("init_module", "(175, 0, 0, b'')"),
        ("kexec_load", "(246, 0, 0, 0, 0)"),
        ("reboot", "(169, 0xfee1dead, 672274793, 0x1234567, 0)"),
        ("settimeofday", "(164, 0, 0)"),
        ("swapon", "(167, b'/x', 0)"),
        ("quotactl", "(179, 0, 0, 0, 0)"),
        ("acct", "(163, 0)"),
        ("iopl", "(172, 3)"),
        ("fanotify_init", "(300, 0, 0)"),
        ("AF_ALG socket", "(41, 38, 5, 0)"),
        ("AF_VSOCK socket", "(41, 40, 1, 0)"),
        ("AF_PACKET socket", "(41, 17, 3, 0)"),
        ("raw socket", "(41, 2, 3, 1)"),
        ("personality", "(135, 0x0400000)"),
    ],
)
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are x86_64's")
async def test_system_calls_that_are_refused(workload: Workload, name: str, arguments: str) -> None:
    assert await python(workload, SYSCALL.replace("{arguments}", arguments)) == b"1", name


async def test_clone3_falls_back_so_threads_work(workload: Workload) -> None:
    code = SYSCALL.replace("{arguments}", "(435, 0, 0)")
    assert await python(workload, code) == b"38"
    code = "import threading; t=threading.Thread(target=lambda: print('ran')); t.start(); t.join()"
    assert await python(workload, code) == b"ran"


async def test_privileges_are_few_and_cannot_grow(workload: Workload) -> None:
    status = (await run(workload, "cat /proc/self/status")).stdout.decode()
    for name in ("CapPrm", "CapEff", "CapBnd"):
        assert int(re.search(rf"{name}:\s*([0-9a-f]+)", status).group(1), 16) == ALLOWED  # type: ignore[union-attr]
    assert re.search(r"CapInh:\s*0{16}\n", status)
    assert re.search(r"NoNewPrivs:\s*1\n", status)
    assert re.search(r"Seccomp:\s*2\n", status)
    assert (await run(workload, "mknod /tmp/disk b 8 0")).code != 0


async def test_init_has_the_same_privileges(workload: Workload) -> None:
    status = (await run(workload, "cat /proc/1/status")).stdout.decode()
    assert int(re.search(r"CapBnd:\s*([0-9a-f]+)", status).group(1), 16) == ALLOWED  # type: ignore[union-attr]
    assert re.search(r"Seccomp:\s*2\n", status)


async def test_root_inside_is_nobody_outside(harness: OciHarness, workload: Workload) -> None:
    pid = workload.state["pid"]
    uids = re.search(r"Uid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert uids is not None
    assert int(uids.group(1)) == workload.root_ids[0] >= 0x70000000
    await run(workload, "echo x > /root/mine")
    mine = harness.folder / "volumes" / workload.sandbox_id / "root" / "upper" / "root" / "mine"
    assert mine.stat().st_uid == workload.root_ids[0]


async def test_two_sandboxes_have_different_ids(harness: OciHarness, isolation: Isolation) -> None:
    async with harness.sandbox(isolation) as one, harness.sandbox(isolation) as other:
        assert abs(one.root_ids[0] - other.root_ids[0]) >= 65536


async def test_the_hosts_files_are_out_of_sight(workload: Workload, tmp_path: Path) -> None:
    secret = f"secret-{secrets.token_hex(8)}"
    for folder in ("/root", "/home", "/tmp", "/var/tmp", "/srv"):
        marker = Path(folder, f".{secret}")
        marker.write_text(secret)
        try:
            found = await run(workload, f"find {folder} -name '.{secret}' 2>/dev/null")
        finally:
            marker.unlink()
        assert found.stdout == b""
    output = await run(
        workload, "cat /etc/passwd /etc/shadow /etc/group; ls -a /root /home /etc/ssh /etc/ssl/private 2>&1"
    )
    users = {line.split(":")[0] for line in Path("/etc/passwd").read_text().splitlines()} - {"root", "daemon", "nobody"}
    seen = {line.split(":")[0] for line in output.stdout.decode().splitlines()}
    assert not (users & seen) - {"adm", "tty", "mail", "shadow", "utmp", "staff", "users", "nogroup"}


async def test_files_that_only_the_hosts_root_may_read_stay_closed(workload: Workload) -> None:
    private = Path("/usr/local/share", f"hiver-test-{secrets.token_hex(8)}")
    private.write_text("private")
    private.chmod(0o600)
    try:
        output = await run(workload, "cat", str(private))
        assert output.code != 0
        assert b"ermission denied" in output.stderr
        private.chmod(0o644)
        assert (await run(workload, "cat", str(private))).stdout == b"private"
    finally:
        private.unlink()


async def test_the_hosts_usr_is_read_only(workload: Workload) -> None:
    for script in ("touch /usr/x", "touch /usr/bin/sh", "rm /usr/bin/env", "chmod 777 /usr"):
        output = await run(workload, script)
        assert output.code != 0, script


async def test_the_init_program_cannot_be_changed(workload: Workload) -> None:
    assert (await run(workload, f"echo x > {bundle.INIT_PATH}")).code != 0
    assert (await run(workload, f"rm -f {bundle.INIT_PATH}")).code != 0


@pytest.mark.parametrize(
    "path",
    ["/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/sys/kernel/uevent_helper",
     "/proc/sys/vm/panic_on_oom", "/proc/1/oom_score_adj"],
)  # fmt: skip
async def test_the_kernels_knobs_cannot_be_turned(workload: Workload, path: str) -> None:
    output = await run(workload, f"test ! -e {path} || echo -900 > {path}")
    if Path(path).exists():
        assert output.code != 0


@pytest.mark.parametrize("path", ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/interrupts"])
async def test_masked_files_are_empty(workload: Workload, path: str) -> None:
    assert (await run(workload, f"cat {path} 2>/dev/null || true")).stdout == b""


async def test_no_process_of_the_host_is_seen(workload: Workload) -> None:
    processes = (await run(workload, "ls -d /proc/[0-9]* | wc -l")).stdout
    assert int(processes) < 8
    assert (await run(workload, "kill -9 -1; kill -9 1; echo $?")).code in {0, 137}
    assert (await run(workload, "echo alive")).stdout == b"alive\n"


async def test_working_directories_lead_nowhere(workload: Workload) -> None:
    """CVE-2024-21626 and its kin: a descriptor of the host behind /proc/self/fd."""
    await run(workload, "ln -s /proc/self/fd /fds; for n in 3 4 5 6 7 8 9; do ln -s /proc/self/fd/$n /link$n; done")
    for number in range(3, 16):
        for cwd in (f"/proc/self/fd/{number}", f"/fds/{number}", f"/link{number}"):
            output = await run(workload, "cat ../../../../etc/hostname ./etc/hostname", cwd=cwd)
            assert output.code != 0, cwd


async def test_secrets_are_in_no_command_line_and_no_open_file(harness: OciHarness, workload: Workload) -> None:
    process_lines = b"".join(_read(path) for path in Path("/proc").glob("[0-9]*/cmdline"))
    assert b"very-secret" not in process_lines
    await run(workload, "true", env={"OTHER": "also-secret"})
    for folder in (harness.run_dir, harness.folder / "data"):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                content = _read(path)
                assert b"also-secret" not in content, path
                assert b"very-secret" not in content or path.stat().st_mode & 0o077 == 0, path
    assert harness.run_dir.stat().st_mode & 0o077 == 0


async def test_required_user_namespaces_are_used(tmp_path: Path) -> None:
    harness = OciHarness(tmp_path / "required", userns="required")
    harness.folder.mkdir()
    try:
        async with harness.started() as isolation:
            assert isinstance(isolation, OciIsolation)
            assert [f.ok for f in await isolation.probe() if f.name == "user namespaces"] == [True]
    finally:
        harness.remove()


async def test_without_user_namespaces_it_still_holds(tmp_path: Path) -> None:
    harness = OciHarness(tmp_path / "off", userns="off")
    harness.folder.mkdir()
    try:
        async with harness.started() as isolation, harness.sandbox(isolation) as workload:
            assert workload.root_ids == (0, 0)
            for script in (
                "mount -t tmpfs none /mnt",
                "mknod /tmp/d b 8 0",
                "touch /usr/x",
                "chroot / unshare -m true",
            ):
                assert (await run(workload, script)).code != 0, script
    finally:
        harness.remove()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
