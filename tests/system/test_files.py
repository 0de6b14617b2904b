"""The file API on a real sandbox: what the server writes the agent can use, and the other way round."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

pytestmark = pytest.mark.system

MIB = 1 << 20


async def create(http: httpx.AsyncClient, key: str) -> str:
    """The sandbox's base path."""
    answer = await http.post(f"/v1/sandboxes/{key}", json={}, headers={"x-hiver-key": key})
    assert answer.status_code in {200, 201}, answer.text
    return f"/sandbox/{answer.json()['id']}/v1/{key}"


async def run(http: httpx.AsyncClient, base: str, command: str) -> str:
    answer = await http.post(f"{base}/exec", json={"command": command})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["stdout"])


@pytest.mark.parametrize("folder", ["/workspace", "/workspace/made", "/srv/made", "/tmp", "/root"])
async def test_both_sides_see_the_same_file(http: httpx.AsyncClient, new_key: Callable[[], str], folder: str) -> None:
    base = await create(http, new_key())
    uploaded = await http.post(f"{base}/file{folder}/script.sh", content=b"#!/bin/sh\necho ran\n")
    assert uploaded.status_code == 200, uploaded.text
    owner = await run(http, base, f"stat -c '%u %g %a' {folder}/script.sh")
    assert owner.split() == ["0", "0", "644"]
    assert await run(http, base, f"chmod +x {folder}/script.sh && {folder}/script.sh") == "ran\n"
    await run(http, base, f"echo changed > {folder}/script.sh")
    assert (await http.get(f"{base}/file{folder}/script.sh")).content == b"changed\n"
    assert (await http.delete(f"{base}/file{folder}/script.sh")).status_code == 204
    assert "script.sh" not in await run(http, base, f"ls {folder}")


async def test_links_and_the_kernels_files(http: httpx.AsyncClient, new_key: Callable[[], str]) -> None:
    base = await create(http, new_key())
    await run(http, base, "ln -s /proc/1/root/etc/hostname /workspace/a; ln -s ../../../../etc/hostname /workspace/b")
    await run(http, base, "ln -s /proc/1/environ /workspace/c; mkfifo /workspace/d")
    inside = await run(http, base, "cat /etc/hostname")
    assert (await http.get(f"{base}/file/workspace/b")).text == inside
    for name in "acd":
        assert (await http.get(f"{base}/file/workspace/{name}")).status_code in {400, 404}, name
    for path in ("/proc/1/environ", "/proc/self/environ", "/proc/kcore", "/dev/null", "/sys/kernel/uevent_seqnum"):
        assert (await http.get(f"{base}/file{path}")).status_code in {400, 404}, path


async def test_the_mount_itself_cannot_be_deleted(http: httpx.AsyncClient, new_key: Callable[[], str]) -> None:
    base = await create(http, new_key())
    answer = await http.delete(f"{base}/file/workspace")
    assert answer.status_code == 409, answer.text
    assert (await http.post(f"{base}/file/workspace/f", content=b"x")).status_code == 200
    assert await run(http, base, "cat /workspace/f") == "x"


async def test_a_sandbox_that_fills_its_disk_is_told_so(http: httpx.AsyncClient, new_key: Callable[[], str]) -> None:
    """And its neighbour is not."""
    first, second = await create(http, new_key()), await create(http, new_key())
    kind = await run(http, first, "df -B1 --output=size /workspace | tail -1")
    if int(kind) > 64 << 30:
        pytest.skip("disks are not bounded here")
    await run(http, first, "fallocate -l $(df -B1 --output=avail /workspace | tail -1) /workspace/filler")
    full = await http.post(f"{first}/file/workspace/more", content=bytes(MIB))
    assert full.status_code == 507, full.text
    assert (await http.post(f"{second}/file/workspace/more", content=bytes(MIB))).status_code == 200
