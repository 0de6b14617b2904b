"""Local mounts under rules, in real sandboxes: what is denied is not there, whatever happens to the server."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest

from conftest import MakeServer
from support.plain import plain_client
from support.sandboxes import Box, local, mount_servers
from support.server import DEFAULT_CONFIG, Server
from support.waiting import until, until_async

pytestmark = pytest.mark.system

RULES = (
    ("/workspace/**", "rw"),
    ("/workspace/fixed/**", "ro"),
    ("/workspace/secret/**", "deny"),
    ("/workspace/**/.env", "deny"),
)


async def filled(box: Box) -> None:
    """By the file API, which no rule binds."""
    for path in ("fixed/f", "secret/s", "open/.env", "open/o"):
        answer = await box.http.post(f"{box.base}/file/workspace/{path}", content=path.encode())
        assert answer.status_code == 200, answer.text


async def test_rules_hold_for_root_and_every_attempt_is_an_event(
    http: httpx.AsyncClient, new_key: Callable[[], str]
) -> None:
    box = await Box.create(http, new_key(), fs=[local("/workspace", *RULES)])
    await filled(box)
    assert await box.out("cd /workspace; find . | sort") == ".\n./fixed\n./fixed/f\n./open\n./open/o\n"
    await box.fails("cat /workspace/secret/s", "No such file")
    await box.fails("ls /workspace/secret", "No such file")
    await box.fails("cat /workspace/open/.env", "No such file")
    await box.fails("mkdir /workspace/secret", "Read-only file system")
    await box.fails("echo x > /workspace/open/.env", "Read-only file system")
    await box.fails("mv /workspace/open/o /workspace/secret", "Read-only file system")
    await box.fails("echo x > /workspace/fixed/f", "Read-only file system")
    await box.fails("rm /workspace/fixed/f", "Read-only file system")
    await box.fails("ln /workspace/fixed/f /workspace/open/link", "not permitted")
    assert await box.out("cat /workspace/fixed/f") == "fixed/f"
    await box.out("ln -s ../secret/s /workspace/open/link")
    await box.fails("cat /workspace/open/link", "No such file")
    assert await box.out("id -u; echo new > /workspace/open/n; stat -c '%u %g %a' /workspace/open/n") == "0\n0 0 644\n"
    await box.until_accessed(
        ("denied", "read", "/workspace/secret"),
        ("denied", "read", "/workspace/open/.env"),
        ("denied", "write", "/workspace/fixed/f"),
        ("allowed", "read", "/workspace/fixed/f"),
        ("allowed", "write", "/workspace/open/n"),
    )
    responses = [event for event in await box.events() if event["type"] == "fs.response"]
    assert {event["backend"] for event in responses} == {"local"}


async def test_what_a_command_did_is_on_record_when_it_has_ended(
    http: httpx.AsyncClient, new_key: Callable[[], str]
) -> None:
    box = await Box.create(http, new_key(), fs=[local("/workspace", *RULES)])
    for number in range(20):
        await box.out(f"echo x > /workspace/open-{number}")
        assert ("allowed", "write", f"/workspace/open-{number}") in await box.accesses()


async def test_the_file_api_is_not_bound_by_rules_and_opens_nothing_for_the_agent(
    http: httpx.AsyncClient, new_key: Callable[[], str]
) -> None:
    box = await Box.create(http, new_key(), fs=[local("/workspace", *RULES)])
    await filled(box)
    assert (await http.get(f"{box.base}/file/workspace/secret/s")).content == b"secret/s"
    listing = (await http.get(f"{box.base}/directories", params={"path": "/workspace"})).json()["entries"]
    assert {entry["name"] for entry in listing} == {"fixed", "secret", "open"}
    await box.fails("cat /workspace/secret/s", "No such file")
    assert "secret" not in await box.out("ls -a /workspace")


async def test_rules_change_for_files_that_are_open(http: httpx.AsyncClient, new_key: Callable[[], str]) -> None:
    first = local("/workspace", ("/workspace/**", "rw"), ("/workspace/none", "deny"))
    box = await Box.create(http, new_key(), fs=[first])
    await box.out("mkdir /workspace/d; echo kept > /workspace/d/f; mkfifo /tmp/go")
    await box.out(
        "cd /workspace/d; (exec 3<f 4>>f; echo ready > /tmp/ready; read _ < /tmp/go; cat <&3; echo more >&4; cat f)"
        " > /tmp/log 2>&1 & while [ ! -e /tmp/ready ]; do sleep 0.1; done"
    )
    await box.applied(fs=[local("/workspace", ("/workspace/**", "rw"), ("/workspace/d/**", "deny"))])
    await box.out("echo > /tmp/go; while ! grep -q 'cat: f' /tmp/log; do sleep 0.1; done")
    log = await box.out("cat /tmp/log")
    assert "kept" not in log
    await box.applied(fs=[first])
    assert await box.out("cat /workspace/d/f") == "kept\n"


async def test_a_native_mount_becomes_governed_also_for_those_who_are_in_it(
    http: httpx.AsyncClient, new_key: Callable[[], str]
) -> None:
    box = await Box.create(http, new_key())
    await box.out("mkdir -p /workspace/secret; echo hush > /workspace/secret/s; echo o > /workspace/o; mkfifo /tmp/go")
    await box.out(
        "cd /workspace/secret; (exec 3<s; echo > /tmp/ready; read _ < /tmp/go; cat s ../o /proc/self/fd/3; ls .; pwd)"
        " > /tmp/log 2>&1 & while [ ! -e /tmp/ready ]; do sleep 0.1; done"
    )
    await box.applied(fs=[local("/workspace", ("/workspace/**", "rw"), ("/workspace/secret/**", "deny"))])
    assert await box.out("ls /workspace; cat /workspace/o") == "o\no\n"
    # What is written there from now on is for those whom the rules let see it.
    answer = await http.post(f"{box.base}/file/workspace/secret/s", content=b"newer")
    assert answer.status_code == 200
    await box.out("echo > /tmp/go; while ! grep -q / /tmp/log; do sleep 0.1; done; sleep 0.2")
    log = await box.out("cat /tmp/log")
    assert "newer" not in log
    await box.applied()  # no fs: the default, which is fully open
    assert await box.out("cat /workspace/secret/s") == "newer"


async def test_what_was_open_to_all_at_the_switch_may_be_restricted_later(
    http: httpx.AsyncClient, new_key: Callable[[], str]
) -> None:
    box = await Box.create(http, new_key())
    await box.out("echo old > /workspace/o; mkfifo /tmp/go")
    await box.out(
        "(exec 3<>/workspace/o; echo > /tmp/ready; read _ < /tmp/go; echo evil >&3; cat /proc/self/fd/3; echo end)"
        " > /tmp/log 2>&1 & while [ ! -e /tmp/ready ]; do sleep 0.1; done"
    )
    await box.applied(fs=[local("/workspace", ("/workspace/**", "rw"), ("/workspace/other", "deny"))])
    await box.applied(fs=[local("/workspace", ("/workspace/**", "rw"), ("/workspace/o", "deny"))])
    assert (await http.get(f"{box.base}/file/workspace/o")).content == b"old\n"
    await box.out("echo > /tmp/go; while ! grep -q end /tmp/log; do sleep 0.1; done")
    assert (await http.get(f"{box.base}/file/workspace/o")).content == b"old\n"


async def test_an_apply_that_fails_leaves_everything_as_it_was(
    http: httpx.AsyncClient, new_key: Callable[[], str]
) -> None:
    before = [local("/workspace", *RULES), local("/data")]
    box = await Box.create(http, new_key(), fs=before)
    await filled(box)
    await box.out("echo d > /data/f")
    unreachable = {"backend": "external", "mount": "/remote", "host": "http://127.0.0.1:9"}
    body = await box.apply(fs=[local("/workspace"), unreachable])
    assert body["applied"] is False
    assert "fs[1]" in body["error"]
    await box.fails("cat /workspace/secret/s", "No such file")
    assert await box.out("cat /data/f; cat /workspace/open/o") == "d\nopen/o"
    await box.fails("ls /remote/x", "No such file")


async def test_an_operators_folder_is_seen_from_both_sides(
    tmp_path: Path, make_server: MakeServer, new_key: Callable[[], str]
) -> None:
    folder = tmp_path / "shared" / "project"
    folder.mkdir(parents=True)
    os.chown(folder, 1234, 1234)
    (folder / "theirs").write_text("outside")
    os.chown(folder / "theirs", 1234, 1234)
    server = make_server(config=f'{DEFAULT_CONFIG}\n[files]\norigin_roots = ["{tmp_path}/shared"]\n')
    with server:
        async with plain_client(base_url=server.url, timeout=30) as client:
            box = await Box.create(
                client, "origin", fs=[local("/p", ("/p/**", "rw"), ("/p/no", "deny"), origin=str(folder))]
            )
            assert await box.out("stat -c '%u %g' /p /p/theirs; cat /p/theirs") == "0 0\n0 0\noutside"
            await box.out("echo inside > /p/ours; mkdir /p/sub; echo x > /p/theirs")
            assert (folder / "ours").read_text() == "inside\n"
            assert {(folder / name).stat().st_uid for name in ("ours", "sub", "theirs")} == {1234}
            (folder / "ours").write_text("changed outside, and longer")
            (folder / "no").write_text("hidden")
            (folder / "later").write_text("late")

            async def sees() -> bool:
                return "changed outside, and longer late" in await box.out("cat /p/ours; echo -n ' '; cat /p/later")

            await until_async(sees, seconds=5, what="the change of the host")
            await box.fails("cat /p/no", "No such file")
            await box.remove()
    assert sorted(os.listdir(folder)) == ["later", "no", "ours", "sub", "theirs"]


@pytest.fixture
async def lasting(make_server: MakeServer) -> AsyncIterator[Server]:
    """A server whose sandboxes outlive it."""
    server = make_server(ephemeral=False)
    server.start()
    return server


async def test_a_killed_server_changes_nothing_for_the_agent(lasting: Server) -> None:
    async with plain_client(base_url=lasting.url, timeout=30) as client:
        box = await Box.create(client, "survivor", fs=[local("/workspace", *RULES)])
        await filled(box)
        await box.out(
            "(while [ ! -e /tmp/stop ]; do n=$((n+1)); echo $n > /workspace/open/tick; cat /workspace/secret/s;"
            " sleep 0.05; done; echo $n > /tmp/n) > /tmp/log 2>&1 &"
        )
        before = mount_servers(box.id)
        os.kill(lasting.pid, signal.SIGKILL)
    until(lambda: not lasting.running, seconds=10, what="the server's end")
    lasting.start()
    async with plain_client(base_url=lasting.url, timeout=30) as client:
        box = Box(client, box.key, box.base)
        assert mount_servers(box.id) == before
        await box.out("touch /tmp/stop; while [ ! -e /tmp/n ]; do sleep 0.1; done")
        log = await box.out("sort -u /tmp/log")
        assert log == "cat: /workspace/secret/s: No such file or directory\n", "it never failed in another way"
        ticks = int(await box.out("cat /tmp/n"))

        async def all_recorded() -> bool:
            events = [event for event in await box.events() if event.get("path") == "/workspace/open/tick"]
            return len(events) == ticks

        await until_async(all_recorded, seconds=10, what=f"{ticks} accesses on record, those without a server too")
        await box.applied(fs=[local("/workspace", ("/workspace/**", "rw"), ("/workspace/open/**", "deny"))])
        await box.fails("ls /workspace/open", "No such file")
        assert await box.out("cat /workspace/secret/s") == "secret/s"
        await box.remove()
        assert mount_servers(box.id) == []


async def test_a_mount_whose_process_dies_is_closed_and_comes_back(
    http: httpx.AsyncClient, new_key: Callable[[], str]
) -> None:
    box = await Box.create(http, new_key(), fs=[local("/workspace", *RULES)])
    await filled(box)
    (pid,) = mount_servers(box.id)
    os.kill(pid, signal.SIGKILL)

    async def back() -> bool:
        code, output = await box.run("cat /workspace/open/o")
        assert code == 0 or "not connected" in output or "No such file" in output, output
        return code == 0

    await until_async(back, seconds=20, what="the mount")
    await box.fails("cat /workspace/secret/s", "No such file")
    assert mount_servers(box.id) != [pid]


async def test_a_dead_mount_is_back_after_a_restart(lasting: Server) -> None:
    async with plain_client(base_url=lasting.url, timeout=30) as client:
        box = await Box.create(client, "both", fs=[local("/workspace", *RULES)])
        await filled(box)
        (pid,) = mount_servers(box.id)
        os.kill(lasting.pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
    until(lambda: not lasting.running, seconds=10, what="the server's end")
    lasting.start()
    async with plain_client(base_url=lasting.url, timeout=30) as client:
        box = Box(client, box.key, box.base)
        assert await box.out("cat /workspace/open/o") == "open/o"
        await box.fails("cat /workspace/secret/s", "No such file")


async def test_an_internal_mount_is_not_for_the_agent(http: httpx.AsyncClient, new_key: Callable[[], str]) -> None:
    box = await Box.create(http, new_key(), fs=[local("/workspace"), local("/hidden", internal=True)])
    await box.fails("ls /hidden", "No such file")
    assert "/hidden" not in await box.out("cat /proc/self/mountinfo")
    config = (await http.get(f"{box.base}/config")).json()
    assert [entry["mount"] for entry in config["fs"]] == ["/workspace", "/hidden"]
    await box.applied(fs=[local("/workspace"), local("/hidden")])
    await box.out("touch /hidden/now")
    await box.applied(fs=[local("/workspace"), local("/hidden", internal=True)])
    await box.fails("ls /hidden/now", "No such file")
