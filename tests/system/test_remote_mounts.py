"""Remote mounts in real sandboxes, on a service that speaks the external contract: what the agent writes arrives."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import MakeServer
from support.fake_external import FakeExternal
from support.fake_http import Answer
from support.plain import plain_client
from support.sandboxes import Box, local, mount_servers
from support.server import Server
from support.waiting import until, until_async

pytestmark = pytest.mark.system

SECRET = "hush-7c1f"


@pytest.fixture
def service() -> Iterator[FakeExternal]:
    with FakeExternal() as service:
        service.credentials = f"someone:{SECRET}"
        yield service


def remote(service: FakeExternal, mount: str = "/remote", **members: Any) -> dict[str, Any]:
    return {"backend": "external", "mount": mount, "host": f"http://someone:{SECRET}@{service.address}", **members}


def content(service: FakeExternal, path: str) -> bytes | None:
    stored = service.files.get(path)
    return None if stored is None else stored.data


def refuse_uploads(service: FakeExternal) -> None:
    """Until `del service._put`."""
    service._put = lambda _: Answer(503)  # type: ignore[method-assign]


async def test_files_are_the_services_in_both_directions(
    http: httpx.AsyncClient, new_key: Callable[[], str], service: FakeExternal
) -> None:
    service.put("/docs/old.txt", b"from the service")
    box = await Box.create(http, new_key(), fs=[remote(service)])
    assert await box.out("cd /remote; find . | sort; cat docs/old.txt") == ".\n./docs\n./docs/old.txt\nfrom the service"
    await box.out(
        "mkdir -p /remote/new; echo one > /remote/new/a; echo two >> /remote/new/a; cp /remote/new/a /remote/new/b"
    )
    until(
        lambda: content(service, "/new/a") == content(service, "/new/b") == b"one\ntwo\n",
        seconds=10,
        what="the uploads",
    )
    await box.out("cd /remote/new; echo draft > .tmp; mv .tmp final; rm b; ln -s final link; mv /remote/docs/old.txt .")
    until(lambda: content(service, "/new/final") == b"draft\n", seconds=10, what="the upload under its last name")
    assert sorted(service.files) == ["/new/a", "/new/final", "/new/link", "/new/old.txt"]
    assert "PUT /new/.tmp" not in {f"{call.method} {call.query.get('path')}" for call in service.calls}
    assert await box.out("cat /remote/new/link /remote/new/old.txt") == "draft\nfrom the service"
    assert (await http.get(f"{box.base}/file/remote/new/a")).content == b"one\ntwo\n"
    assert (await http.post(f"{box.base}/file/remote/up", content=b"by the API")).status_code == 200
    until(lambda: content(service, "/up") == b"by the API", seconds=10, what="the upload of the API's file")


async def test_calls_of_the_service_are_events_and_the_credential_is_nowhere(
    http: httpx.AsyncClient, new_key: Callable[[], str], service: FakeExternal, server: Server
) -> None:
    service.put("/in", b"x")
    box = await Box.create(http, new_key(), fs=[remote(service)])
    await box.out("cat /remote/in; echo out > /remote/out")

    async def put_answered() -> bool:
        events = await box.events()
        puts = {
            event["id"]
            for event in events
            if event["type"] == "system.fs-sync-request"
            and (event["operation"], event["path"]) == ("put", "/remote/out")
        }
        answered = {event["request_id"] for event in events if event["type"] == "system.fs-sync-response"}
        return bool(puts & answered)

    await until_async(put_answered, seconds=10, what="the put on record")
    events = await box.events()
    operations = {event["operation"] for event in events if event["type"] == "system.fs-sync-request"}
    assert {"list-dir", "get", "put"} <= operations
    await box.until_accessed(("allowed", "read", "/remote/in"), ("allowed", "write", "/remote/out"))
    assert {event["backend"] for event in events if event["type"] == "fs.response"} == {"external"}
    await box.apply(fs=[remote(service, acls=[{"path": "/remote/**", "access": "ro"}])])
    assert SECRET not in str(await box.events())
    assert SECRET not in server.log_path.read_text()
    assert SECRET not in await box.out(
        "cat /proc/*/cmdline /proc/*/environ /proc/self/mountinfo 2>/dev/null | tr '\\0' ' '"
    )
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                assert SECRET.encode() not in (process / "cmdline").read_bytes()
                if b"mount-server" in (process / "cmdline").read_bytes():
                    assert SECRET.encode() not in (process / "environ").read_bytes()
            except OSError:
                continue
    readable = [
        path
        for path in (
            *server.data_dir.glob("*"),
            *server.data_dir.glob("remote/*/*/*"),
            *Path("/run/hiver").glob("*/mounts/*/*/*"),
        )
        if path.name != "fs" and path.is_file() and path.stat().st_mode & 0o077 and SECRET.encode() in path.read_bytes()
    ]
    assert readable == []


async def test_a_service_that_fails_gets_the_file_later_and_nothing_is_lost(
    http: httpx.AsyncClient, new_key: Callable[[], str], service: FakeExternal
) -> None:
    box = await Box.create(http, new_key(), fs=[remote(service)])
    refuse_uploads(service)
    await box.out("echo kept > /remote/f; cat /remote/f")

    async def failed() -> bool:
        return any(event.get("error") for event in await box.events() if event["type"] == "system.fs-sync-response")

    await until_async(failed, seconds=30, what="a failed upload on record")
    assert await box.out("cat /remote/f") == "kept\n"
    del service._put
    until(lambda: content(service, "/f") == b"kept\n", seconds=30, what="the upload")


async def test_what_somebody_else_changed_is_never_overwritten(
    http: httpx.AsyncClient, new_key: Callable[[], str], service: FakeExternal
) -> None:
    service.put("/notes.txt", b"first")
    box = await Box.create(http, new_key(), fs=[remote(service)])
    await box.out("(sleep 2; echo ours) >> /remote/notes.txt & sleep 0.5; echo > /tmp/open; wait")
    service.put("/notes.txt", b"theirs, meanwhile")

    def both() -> bool:
        others = [path for path in service.files if path.startswith("/notes (conflict ")]
        return len(others) == 1 and content(service, others[0]) == b"firstours\n"

    until(both, seconds=15, what="both versions on the service")
    assert content(service, "/notes.txt") == b"theirs, meanwhile"


async def test_a_service_that_cannot_be_used_is_told_at_once(
    http: httpx.AsyncClient, new_key: Callable[[], str], service: FakeExternal
) -> None:
    key = new_key()
    entry = {**remote(service), "host": f"http://someone:wrong@{service.address}"}
    answer = await http.post(f"/v1/sandboxes/{key}", json={"fs": [local(), entry]}, headers={"x-hiver-key": key})
    assert answer.status_code == 400, answer.text
    assert "fs[1]" in answer.json()["error"]
    assert "wrong" not in answer.text
    box = await Box.create(http, key, fs=[local()])
    body = await box.apply(fs=[local(), entry])
    assert body["applied"] is False
    assert "fs[1]" in body["error"]
    await box.applied(fs=[local(), remote(service)])
    await box.out("echo x > /remote/x")
    until(lambda: content(service, "/x") == b"x\n", seconds=10, what="the upload")
    # New credentials take the place of the old ones without a new mount.
    service.credentials = "someone:else"
    await box.out("echo y > /remote/y")
    await box.applied(fs=[local(), {**remote(service), "host": f"http://someone:else@{service.address}"}])
    until(lambda: content(service, "/y") == b"y\n", seconds=20, what="the upload with the new credentials")


async def test_a_mount_that_is_taken_away_uploads_first(
    http: httpx.AsyncClient, new_key: Callable[[], str], service: FakeExternal
) -> None:
    box = await Box.create(http, new_key(), fs=[local(), remote(service)])
    await box.out("for n in $(seq 50); do echo $n > /remote/$n; done")
    await box.applied(fs=[local()])
    await box.fails("ls /remote/1", "No such file")
    until(lambda: len(service.files) == 50, seconds=20, what="all uploads")


DIRTY = 1000


def pending_files(data_dir: Path) -> int:
    """How many files the databases of remote mounts say are not uploaded."""
    count = 0
    for database in data_dir.glob("remote/*/*/state.sqlite3"):
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
            count += int(connection.execute("SELECT count(*) FROM entries WHERE pending").fetchone()[0])
    return count


async def test_a_thousand_dirty_files_survive_the_end_of_everything(
    make_server: MakeServer, service: FakeExternal
) -> None:
    """The server and the mount's process are killed while the service refuses; then the sandbox ends as well."""
    server = make_server(ephemeral=False, config="[files]\ndrain_seconds = 1\n")
    server.start()
    async with plain_client(base_url=server.url, timeout=60) as client:
        box = await Box.create(client, "dirty", fs=[remote(service)])
        refuse_uploads(service)
        await box.out(
            f'cd /remote; mkdir d; for n in $(seq {DIRTY}); do echo "content of $n" > f$n; done; sync; ls | wc -l'
        )
        await box.remove()  # drains for a second, in vain
        await Box.create(client, "other", fs=[local()])
    for process in mount_servers(box.id):
        os.kill(process, signal.SIGKILL)
    os.kill(server.pid, signal.SIGKILL)
    until(lambda: not server.running, seconds=10, what="the server's end")
    assert pending_files(server.data_dir) == DIRTY
    assert not [path for path in service.files if path.startswith("/f")]
    del service._put
    server.start()
    until(lambda: len(service.files) >= DIRTY, seconds=60, what="all files on the service")
    for number in (1, DIRTY // 2, DIRTY):
        assert content(service, f"/f{number}") == f"content of {number}\n".encode()
    until(lambda: not list(server.data_dir.glob("remote/*")), seconds=20, what="nothing kept that is uploaded")
    assert "uploading what it left" in server.log_path.read_text()


async def test_a_killed_server_does_not_interrupt_uploads(make_server: MakeServer, service: FakeExternal) -> None:
    server = make_server(ephemeral=False)
    server.start()
    async with plain_client(base_url=server.url, timeout=60) as client:
        box = await Box.create(client, "alone", fs=[remote(service)])
        await box.out(
            "(while [ ! -e /tmp/stop ]; do n=$((n+1)); echo $n > /remote/n$n; sleep 0.05; done) > /dev/null 2>&1 &"
        )
        os.kill(server.pid, signal.SIGKILL)
    until(lambda: not server.running, seconds=10, what="the server's end")
    seen = len(service.files)
    until(lambda: len(service.files) > seen + 20, seconds=20, what="uploads without a server")
    server.start()
    async with plain_client(base_url=server.url, timeout=60) as client:
        box = Box(client, box.key, box.base)
        await box.out("touch /tmp/stop")
        assert await box.out("cat /remote/n1") == "1\n"
        await box.remove()


async def test_uploads_of_a_sandbox_that_is_gone_outlive_their_process(
    http: httpx.AsyncClient, new_key: Callable[[], str], service: FakeExternal
) -> None:
    """Without a restart of the server."""
    box = await Box.create(http, new_key(), fs=[remote(service)])
    refuse_uploads(service)
    await box.out("echo kept > /remote/f")
    await box.remove()
    (process,) = mount_servers(box.id)
    os.kill(process, signal.SIGKILL)
    del service._put
    until(lambda: content(service, "/f") == b"kept\n", seconds=20, what="the upload by another process")
    until(lambda: not mount_servers(box.id), seconds=10, what="its end")
