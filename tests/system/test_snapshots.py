"""Snapshots of real sandboxes: captured, restored, and never half of either."""

from __future__ import annotations

import io
import random
import subprocess
import tarfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import MakeServer
from support.plain import plain_client
from support.sandboxes import Box, local
from support.waiting import until, until_async

pytestmark = pytest.mark.system


def new_snapshot() -> str:
    return f"s-{uuid.uuid4().hex[:12]}"


async def capture(box: Box, key: str, **files: Any) -> dict[str, Any]:
    """The `files` part of the answer."""
    answer = await box.http.post(f"{box.base}/snapshot", json={"files": {"key": key, **files}}, timeout=60)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    assert "files" in body, body
    assert body["files"]["captured"] is True
    assert body["files"]["key"] == key
    assert body["files"]["bytes"] > 0
    return dict(body["files"])


FILL = """
set -e
mkdir -p /root/kept/inner /srv/gone
cd /root/kept
echo text > file; chmod 640 file; touch -d '2001-02-03 04:05:06.123456789' file
ln file hard; ln -s file soft; mkfifo pipe
truncate -s 100M sparse; printf end >> sparse
printf x > owned; chown 12:34 owned
python3 -c "import os; os.setxattr('file', 'user.note', b'kept')"
mkdir empty; chmod 2750 empty; touch -d '2002-02-03 04:05:06' inner
printf '%0250d' 0 > inner/$(printf 'n%.0s' $(seq 200))
echo changed > /etc/issue
rm -f /etc/nsswitch.conf
"""
LOOK = """
cd /root/kept
stat -c '%n %a %u %g %s %y %h %F' file hard soft pipe owned empty inner sparse
cat file; readlink soft; [ file -ef hard ] && echo linked; tail -c 3 sparse; echo
[ $(stat -c %b sparse) -lt 1000 ] && echo holes
python3 -c "import os; print(os.getxattr('file', 'user.note'))"
wc -c inner/n*
cat /etc/issue; ls /etc/nsswitch.conf 2>&1 || true
"""


async def test_what_a_sandbox_wrote_is_in_the_next_one(http: httpx.AsyncClient, new_key: Callable[[], str]) -> None:
    key = new_snapshot()
    first = await Box.create(http, new_key())
    await first.out(FILL)
    before = await first.out(LOOK)
    assert "cannot access '/etc/nsswitch.conf'" in before
    await capture(first, key)
    assert await first.out("echo still running") == "still running\n"
    await first.remove()
    second = await Box.create(http, new_key(), snapshot={"files": {"key": key}})
    assert await second.out(LOOK) == before
    assert await second.out("cat /etc/hostname") != await first_name(first)


async def first_name(box: Box) -> str:
    return f"{box.key}\n"


async def test_a_folder_of_the_image_that_was_replaced(http: httpx.AsyncClient, new_key: Callable[[], str]) -> None:
    key = new_snapshot()
    box = await Box.create(http, new_key())
    found = await box.out("find /etc -mindepth 2 -type f | grep -v -e ssl -e pki -e ca-cert | head -1")
    folder = found.strip().rpartition("/")[0]
    assert folder.startswith("/etc/"), found
    await box.out(f"rm -r {folder}; mkdir {folder}; echo new > {folder}/new")
    await capture(box, key)
    again = await Box.create(http, new_key(), snapshot={"files": {"key": key}})
    assert await again.out(f"ls -A {folder}; cat {folder}/new") == "new\nnew\n"


async def test_mounts_are_left_out_unless_a_pattern_names_them(
    http: httpx.AsyncClient, new_key: Callable[[], str]
) -> None:
    all_of_root, workspace = new_snapshot(), new_snapshot()
    box = await Box.create(http, new_key())
    await box.out("echo w > /workspace/w; mkdir -p /workspace/d /root/r; echo d > /workspace/d/d; echo r > /root/r/r")
    await capture(box, all_of_root)
    await capture(box, workspace, include=["/workspace/**"])
    await box.remove()
    first = await Box.create(http, new_key(), snapshot={"files": {"key": all_of_root}})
    assert await first.out("ls /workspace; cat /root/r/r") == "r\n"
    second = await Box.create(http, new_key(), snapshot={"files": {"key": workspace}})
    assert await second.out("cat /workspace/w /workspace/d/d; ls /root") == "w\nd\n"
    third = await Box.create(http, new_key(), snapshot={"files": {"key": workspace, "include": ["/workspace/d/*"]}})
    assert await third.out("ls /workspace; cat /workspace/d/d") == "d\nd\n"


async def test_shutdown_captures_when_asked_to(http: httpx.AsyncClient, new_key: Callable[[], str]) -> None:
    asked, not_asked = new_snapshot(), new_snapshot()
    for key, write in ((asked, True), (not_asked, False)):
        box = await Box.create(
            http,
            new_key(),
            snapshot={"files": {"key": key, "include": ["/workspace/**"], "write_on_shutdown": write}},
        )
        await box.out("echo kept > /workspace/f")
        await box.remove()
    again = await Box.create(http, new_key(), snapshot={"files": {"key": asked}})
    assert await again.out("cat /workspace/f") == "kept\n"
    afresh = await Box.create(http, new_key(), snapshot={"files": {"key": not_asked}})
    assert await afresh.out("ls /workspace") == ""


async def test_the_old_form_always_writes_and_falls_back_to_the_restore_key(
    http: httpx.AsyncClient, new_key: Callable[[], str]
) -> None:
    key, other = new_snapshot(), new_snapshot()
    box = await Box.create(http, new_key(), snapshot={"restore_key": key, "include": ["/workspace/**"]})
    await box.out("echo 1 >> /workspace/f")
    await box.remove()
    box = await Box.create(
        http, new_key(), snapshot={"restore_key": key, "write_key": other, "include": ["/workspace/**"]}
    )
    await box.out("echo 2 >> /workspace/f")
    await box.remove()
    for name, content in ((key, "1\n"), (other, "1\n2\n")):
        box = await Box.create(http, new_key(), snapshot={"restore_key": name, "write_key": new_snapshot()})
        assert await box.out("cat /workspace/f") == content


async def test_the_end_of_the_entrypoint_and_of_the_time_are_ends_too(
    http: httpx.AsyncClient, new_key: Callable[[], str]
) -> None:
    async def ended(**config: Any) -> None:
        key = new_snapshot()
        files = {"key": key, "include": ["/workspace/**"], "write_on_shutdown": True}
        box = await Box.create(http, new_key(), snapshot={"files": files}, **config)

        async def gone() -> bool:
            listed = (await http.get("/controller/v1/sandboxes")).json()
            return box.key not in {entry["key"] for entry in listed}

        await until_async(gone, seconds=20, what="the end of the sandbox")
        again = await Box.create(http, new_key(), snapshot={"files": {"key": key}})
        assert await again.out("cat /workspace/f") == "by the entrypoint\n"

    await ended(entrypoint=["sh", "-c", "echo by the entrypoint > /workspace/f; sleep 0.5"])
    await ended(entrypoint=["sh", "-c", "echo by the entrypoint > /workspace/f; sleep 600"], ttl=1)


async def test_a_machine_snapshot_of_a_container_is_not_captured_and_says_why(
    http: httpx.AsyncClient, new_key: Callable[[], str]
) -> None:
    box = await Box.create(http, new_key())
    answer = await box.http.post(f"{box.base}/snapshot", json={"vm": {"key": "v"}})
    assert answer.status_code == 200
    assert answer.json()["vm"]["captured"] is False
    assert "microVM" in answer.json()["vm"]["reason"]


async def test_ephemeral_servers_capture_what_they_remove(make_server: MakeServer) -> None:
    server = make_server()
    key = new_snapshot()
    files = {"key": key, "include": ["/workspace/**"], "write_on_shutdown": True}
    with server:
        async with plain_client(base_url=server.url, timeout=30) as http:
            box = await Box.create(http, "one", snapshot={"files": files})
            await box.out("echo kept > /workspace/f")
    with server:
        async with plain_client(base_url=server.url, timeout=30) as http:
            box = await Box.create(http, "two", snapshot={"files": {"key": key}})
            assert await box.out("cat /workspace/f") == "kept\n"


async def test_rules_of_mounts_hold_for_snapshots(http: httpx.AsyncClient, new_key: Callable[[], str]) -> None:
    key = new_snapshot()
    rules = (("/workspace/**", "rw"), ("/workspace/secret/**", "deny"))
    box = await Box.create(http, new_key(), fs=[local("/workspace", *rules)])
    await box.out("echo open > /workspace/open")
    answer = await box.http.post(f"{box.base}/file/workspace/secret/s", content=b"secret")
    assert answer.status_code == 200, answer.text
    await capture(box, key, include=["/workspace/**"])
    again = await Box.create(http, new_key(), snapshot={"files": {"key": key}})
    assert await again.out("find /workspace -type f") == "/workspace/open\n"
    governed = await Box.create(http, new_key(), fs=[local("/workspace", *rules)], snapshot={"files": {"key": key}})
    assert await governed.out("cat /workspace/open") == "open\n"


async def test_a_server_that_dies_in_the_middle_leaves_nothing_paused(make_server: MakeServer) -> None:
    server = make_server(ephemeral=False)
    server.start()
    async with plain_client(base_url=server.url, timeout=30) as http:
        box = await Box.create(http, "paused")
        freezer = await freezer_of(box)
        freezer("FROZEN")
        server.kill()
        server.start()
        until(server.answers, seconds=20, what="an answer")
        assert await box.out("echo alive") == "alive\n"


async def freezer_of(box: Box) -> Callable[[str], None]:
    """Of the control group in which a command of the sandbox finds itself, as the host sees it."""
    seconds = str(random.randrange(10**8, 10**9))
    await box.out(f"exec > /dev/null 2>&1; sleep {seconds} &")

    def found_pid() -> str:
        return subprocess.run(
            ["pgrep", "-f", f"^sleep {seconds}$"], capture_output=True, check=False, text=True
        ).stdout.strip()

    pid = until(found_pid, seconds=20, what="the command runs")  # the shell may not have started it yet
    places = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    candidates = [
        *(Path(f"/sys/fs/cgroup/freezer{path}/freezer.state") for _, names, path in places if names == "freezer"),
        *(Path(f"/sys/fs/cgroup{path}/cgroup.freeze") for _, names, path in places if not names),
    ]
    found = [file for file in candidates if file.exists()]
    assert found

    def write(word: str) -> None:
        for file in found:
            file.write_text(word if file.name == "freezer.state" else str(int(word == "FROZEN")))

    return write


MAPPING = """
import mmap, os, time
file = open("/root/mapped", "r+b")
memory = mmap.mmap(file.fileno(), 4096)
told = os.open("/root/number", os.O_WRONLY | os.O_CREAT)
number = 0
while True:
    number += 1
    memory[:8] = b"%08d" % number
    if number % 1000 == 0:
        os.pwrite(told, b"%08d" % number, 0)
"""


async def test_what_is_written_while_it_is_captured_is_of_one_moment(
    http: httpx.AsyncClient, new_key: Callable[[], str]
) -> None:
    """A program counts in mapped memory and now and then in a file: in a snapshot one is just ahead of the other."""
    box = await Box.create(http, new_key())
    await box.out(
        "mkdir /root/many; cd /root/many; for i in $(seq 3000); do echo $i > $i; done; truncate -s 4096 ../mapped"
    )
    await box.http.post(f"{box.base}/file/root/count.py", content=MAPPING.encode())
    await box.out("setsid python3 /root/count.py > /dev/null 2>&1 < /dev/null & sleep 1")
    for _ in range(3):
        key = new_snapshot()
        await capture(box, key)
        again = await Box.create(http, new_key(), snapshot={"files": {"key": key}})
        mapped, number = (await again.out("head -c 8 /root/mapped; echo; cat /root/number")).split()
        assert 0 <= int(mapped) - int(number) <= 1000
        assert await again.out("ls /root/many | wc -l") == "3000\n"


def hostile_archive(content: bytes) -> bytes:
    """Tries to write to the host, then puts a file where it belongs."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:

        def add(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = content) -> None:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mode = kind, link, 0o755
            member.size = len(data) if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(data))

        add("../../../../tmp/hiver-escaped")
        add("up", tarfile.SYMTYPE, "/../../../../../tmp")
        add("up/hiver-escaped")
        add("dev", tarfile.SYMTYPE, "/dev")
        add("proc/1/root/tmp/hiver-escaped")
        add("disk", tarfile.BLKTYPE)
        add("usr/bin/sh")
        add("workspace/hard", tarfile.LNKTYPE, "/etc/shadow")
        add("workspace/in", data=b"inside\n")
    return out.getvalue()


async def test_a_hostile_archive_stays_in_the_sandbox(http: httpx.AsyncClient, new_key: Callable[[], str]) -> None:
    key = new_snapshot()
    answer = await http.put(f"/v1/snapshots/{key}/archive", content=hostile_archive(b"x"))
    assert answer.status_code == 201, answer.text
    box = await Box.create(http, new_key(), snapshot={"files": {"key": key}})
    assert await box.out("cat /workspace/in; ls -d /up/hiver-escaped; [ -b /disk ] || echo none") == (
        "inside\n/up/hiver-escaped\nnone\n"
    )
    assert not Path("/tmp/hiver-escaped").exists()


async def test_a_damaged_snapshot_is_a_fresh_start_and_told(make_server: MakeServer) -> None:
    server = make_server()
    key = new_snapshot()
    with server:
        async with plain_client(base_url=server.url, timeout=30) as http:
            box = await Box.create(http, "one")
            await box.out("echo kept > /root/kept")
            await capture(box, key)
            [archive] = (server.data_dir / "snapshots" / key).glob("*.tar.zst")
            content = bytearray(archive.read_bytes())
            content[len(content) // 2] ^= 1
            archive.write_bytes(content)
            again = await Box.create(http, "two", snapshot={"files": {"key": key}})
            assert await again.out("ls /root") == ""
            errors = [event["error"] for event in await again.events() if "error" in event]
            assert any("damaged" in error for error in errors), errors
    assert "starts afresh" in server.log_tail()


async def test_what_does_not_fit_is_not_there_by_half(make_server: MakeServer) -> None:
    """Files for which the sandbox's disk is too small: it is made anew, without any of them."""
    server = make_server(config="[sandbox]\ndisk_mib = 1024\n")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as tar:
        for number in range(3):
            member = tarfile.TarInfo(f"root/f{number}")
            member.size = 500 << 20
            tar.addfile(member, Zeros())  # type: ignore[arg-type]
    with server:
        async with plain_client(base_url=server.url, timeout=100) as http:
            key = new_snapshot()
            answer = await http.put(f"/v1/snapshots/{key}/archive", content=out.getvalue())
            assert answer.status_code == 201, answer.text
            box = await Box.create(http, "one", snapshot={"files": {"key": key}})
            assert await box.out("ls /root; echo x > /root/x; cat /root/x") == "x\n"
            errors = [event["error"] for event in await box.events() if "error" in event]
            assert any("No space" in error for error in errors), errors
    assert "made anew" in server.log_tail()


class Zeros:
    def read(self, size: int) -> bytes:
        return bytes(size)


async def test_a_remote_store_round_trips(make_server: MakeServer, tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    server = make_server(config=f'[snapshots]\nstore = "remote"\nurl = "file://{bucket}"\ncompression = "gzip"\n')
    key = new_snapshot()
    files = {"key": key, "include": ["/workspace/**"], "write_on_shutdown": True}
    with server:
        async with plain_client(base_url=server.url, timeout=60) as http:
            for count in (1, 2):
                box = await Box.create(http, "box", snapshot={"files": files})
                assert await box.out("echo x >> /workspace/f; wc -l < /workspace/f") == f"{count}\n"
                await box.remove()
    assert any(bucket.rglob("*"))
