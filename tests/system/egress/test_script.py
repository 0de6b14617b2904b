"""An `override_script` in a real sandbox: the upstream sees what it makes, the agent and the events do not."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.plain import NOBODY, plain_client
from support.server import Server
from support.upstreams import HttpUpstream, lead
from support.waiting import until

KEY = "k3y-of-the-operator"
SIGNING = f"""
local key = "{KEY}"
headers["X-Signature"] = b64encode(key .. method .. host .. path .. "?" .. query .. body)
headers["X-Agent"] = nil
body = b64encode(body)
"""


def worker_pids(server: Server) -> list[int]:
    """Children of the server that run scripts, and their forks."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if b"script_worker" in command and parent == server.pid:
            children = (entry / "task" / entry.name / "children").read_text().split()
            found += [int(entry.name), *map(int, children)]
    return found


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def told(events: list[dict[str, Any]]) -> str:
    return json.dumps(events)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_script_signs_a_request(sandboxes: Any, plain: HttpUpstream, secure: HttpUpstream, scheme: str) -> None:
    upstream = plain if scheme == "http" else secure
    sandbox = await sandboxes(egress=[lead("api.test", upstream, override_script=SIGNING)])
    done = await sandbox.run(f"curl -sS -H 'X-Agent: me' -d 'agent body' '{scheme}://api.test/status/200?q=1'")
    assert (done.stdout, done.exit_code) == ("", 0), done.stderr
    (seen,) = upstream.seen
    assert seen.body == base64.b64encode(b"agent body")
    assert seen.header("Content-Length") == str(len(seen.body))
    assert (
        seen.header("X-Signature") == base64.b64encode(f"{KEY}POSTapi.test/status/200?q=1agent body".encode()).decode()
    )
    assert seen.header("X-Agent") is None
    assert seen.header("Host") == "api.test"
    request, response = await sandbox.events()
    assert (request["access"], request["body"], response["status"]) == ("allowed", "agent body", 200)
    assert request["headers"]["X-Agent"] == "me"
    assert "X-Signature" not in request["headers"]


async def test_what_a_script_sets_is_redacted_where_an_upstream_sends_it_back(
    sandboxes: Any, plain: HttpUpstream
) -> None:
    script = f'headers["Authorization"] = "Bearer {KEY}"'
    sandbox = await sandboxes(egress=[lead("api.test", plain, override_script=script)])
    done = await sandbox.run("curl -sS http://api.test/echo")
    assert KEY in done.stdout  # what an upstream tells, the agent hears
    events = await sandbox.events()
    assert KEY not in told(events)
    assert "[redacted]" in told([event for event in events if event["type"] == "egress.chunk"])


async def test_a_script_comes_after_the_override(sandboxes: Any, plain: HttpUpstream) -> None:
    rule = lead(
        "api.test",
        plain,
        override={"query": {"k": "v"}, "headers": {"x-key": "1"}, "prefix_path": "/pre/", "body": {"b": 2}},
        override_script='headers["X-Seen"] = table.concat({path, query, headers["X-Key"], body}, "|")',
    )
    sandbox = await sandboxes(egress=[rule])
    await sandbox.run("""curl -sS -H 'Content-Type: application/json' -d '{"a": 1}' 'http://api.test/p?a=1'""")
    (seen,) = plain.seen
    assert seen.header("X-Seen") == '/pre/p|a=1&k=v|1|{"a":1,"b":2}'
    assert seen.body == b'{"a":1,"b":2}'


async def test_requests_without_a_body_get_none_unless_the_script_makes_one(
    sandboxes: Any, plain: HttpUpstream
) -> None:
    script = 'if path == "/make" then body = "made" end headers["X-Ran"] = "1"'
    sandbox = await sandboxes(egress=[lead("api.test", plain, override_script=script)])
    await sandbox.run("curl -sS http://api.test/plain http://api.test/make")
    without, made = plain.seen
    assert (without.header("Content-Length"), without.body, without.header("X-Ran")) == (None, b"", "1")
    assert (made.header("Content-Length"), made.body) == ("4", b"made")


async def test_bodies_pass_unchanged_whatever_is_in_them(sandboxes: Any, plain: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", plain, override_script='headers["X-Size"] = #body')])
    body = os.urandom(1 << 20)
    await sandbox.write("/workspace/body", body)
    for option in ("", "-H 'Transfer-Encoding: chunked'", "-H 'Content-Encoding: gzip'"):
        await sandbox.run(f"curl -sS {option} --data-binary @/workspace/body http://api.test/status/200")
    assert [seen.body == body for seen in plain.seen] == [True] * 3
    assert [seen.header("X-Size") for seen in plain.seen] == [str(len(body))] * 3
    assert plain.seen[2].header("Content-Encoding") == "gzip"


async def test_bodies_that_are_too_large_are_refused(sandboxes: Any, plain: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", plain, override_script="local x = 1")])
    done = await sandbox.run(
        "head -c 9000000 /dev/zero | curl -sS -o /dev/null -w '%{http_code}' -H Expect: --data-binary @- http://api.test/"
    )
    assert done.stdout == "413"
    assert plain.seen == []


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("x = = 1", "it is no valid Lua, in line 1"),
        ("\nlocal s3cret = nil .. body", "it raised an error, in line 2: attempt to concatenate a nil value"),
        ("while true do end", "it needs more than 200 ms of processor time"),
        ('body = ("x"):rep(1e9)', "it needs more than 64 MiB of memory"),
        ('body = ("x"):rep(9000000)', "the body that it left is larger than 8 MiB"),
        ('headers["X-A"] = "a\\r\\nX-B: s3cret"', "it left a header field with control characters"),
        ('headers["Host"] = "s3cret.test"', "it set a header field that is not its own"),
        ('headers["Transfer-Encoding"] = "chunked"', "it set a header field that is not its own"),
        ('error("s3cret")', "it raised an error"),
    ],
)
async def test_a_script_that_fails_denies_the_request(
    sandboxes: Any, plain: HttpUpstream, script: str, reason: str
) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", plain, override_script=script)])
    done = await sandbox.run("curl -sS -w ' %{http_code}' -d 'agent body' http://api.test/")
    assert done.stdout == "egress failed: the request could not be prepared\n 502"
    request, response, chunk = await sandbox.events()
    assert (request["type"], request["access"], request["body"]) == ("egress.request", "denied", "agent body")
    assert (response["type"], response["request_id"], response["status"]) == ("egress.response", request["id"], 502)
    assert (chunk["type"], chunk["request_id"]) == ("egress.chunk", request["id"])
    assert chunk["body"].startswith(f"override_script failed: {reason}")
    assert "s3cret" not in told([request, response, chunk])
    assert plain.connections == 0


async def test_a_hanging_script_of_one_sandbox_does_not_hold_up_another(
    sandboxes: Any, plain: HttpUpstream, egress_server: Server
) -> None:
    greedy = await sandboxes(egress=[lead("api.test", plain, override_script="while true do end")])
    modest = await sandboxes(egress=[lead("api.test", plain, override_script='headers["X-Ran"] = "1"')])
    hanging = asyncio.create_task(greedy.run("for i in $(seq 12); do curl -sS http://api.test/$i & done; wait"))
    done = await modest.run("curl -sS -o /dev/null -w '%{http_code} %{time_total}' http://api.test/status/200")
    status, seconds = done.stdout.split()
    assert status == "200"
    assert float(seconds) < 2
    assert (await hanging).stdout.count("could not be prepared") == 12
    assert all(seen.path == "/status/200" for seen in plain.seen)


async def test_a_changed_script_is_in_force_at_once(sandboxes: Any, plain: HttpUpstream) -> None:
    def rule(value: int) -> list[dict[str, Any]]:
        return [lead("api.test", plain, override_script=f'headers["X-V"] = {value}')]

    sandbox = await sandboxes(egress=rule(1))
    await sandbox.run("curl -sS http://api.test/")
    await sandbox.apply(egress=rule(2))
    await sandbox.run("curl -sS http://api.test/")
    assert [seen.header("X-V") for seen in plain.seen] == ["1", "2"]


@pytest.mark.parametrize("end", [Server.stop, Server.kill], ids=["stopped", "killed"])
def test_workers_end_with_the_server_and_the_next_one_has_its_own(
    make_server: Callable[..., Server], plain: HttpUpstream, end: Callable[[Server], object]
) -> None:
    server = make_server(ephemeral=False)
    server.start()
    script = 'if path == "/hang" then while true do end end headers["X-Ran"] = "1"'
    config = {"egress": [lead("api.test", plain, override_script=script)]}
    with httpx.Client(base_url=server.url, timeout=60, verify=NOBODY) as client:
        sandbox_id = client.post("/v1/sandboxes/s", json=config).json()["id"]
        base = f"/sandbox/{sandbox_id}/v1/s"

        def curl(path: str) -> str:
            command = f"curl -sS -o /dev/null -w '%{{http_code}}' http://api.test{path}"
            return str(client.post(f"{base}/exec", json={"command": command}).json()["stdout"])

        assert curl("/status/200") == "200"
        pids = worker_pids(server)
        assert pids
        end(server)
        until(lambda: not any(lives(pid) for pid in pids), seconds=10, what="the workers end")
        server.start()
        assert curl("/status/200") == "200"
        assert curl("/hang") == "502"
        assert curl("/status/200") == "200"
        assert not set(worker_pids(server)) & set(pids)
    assert [seen.header("X-Ran") for seen in plain.seen] == ["1"] * 3


async def test_workers_leave_no_zombies_and_no_descriptors(
    make_server: Callable[..., Server], plain: HttpUpstream
) -> None:
    """The server is a subreaper: what a killed worker leaves would be its child."""
    server = make_server()
    server.start()
    config = {"egress": [lead("api.test", plain, override_script='headers["X-Ran"] = "1"')]}
    async with plain_client(base_url=server.url, timeout=60) as client:
        sandbox_id = (await client.post("/v1/sandboxes/s", json=config)).json()["id"]

        async def curl() -> str:
            command = {"command": "curl -sS -o /dev/null -w '%{http_code}' http://api.test/status/200"}
            return str((await client.post(f"/sandbox/{sandbox_id}/v1/s/exec", json=command)).json()["stdout"])

        assert await curl() == "200"
        for _ in range(5):
            worker, *_ = worker_pids(server)
            os.kill(worker, 9)
            until(lambda pid=worker: not Path(f"/proc/{pid}").exists(), seconds=10, what="it is reaped")
            assert await curl() == "200"
        descriptors = server.open_descriptors()
        for _ in range(5):
            worker, *_ = worker_pids(server)
            os.kill(worker, 9)
            until(lambda pid=worker: not Path(f"/proc/{pid}").exists(), seconds=10, what="it is reaped")
            assert await curl() == "200"
        deadline = time.monotonic() + 10
        while server.open_descriptors() > descriptors + 3 and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        assert server.open_descriptors() <= descriptors + 3
        zombies = [
            entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit() and _zombie_of(entry, server.pid)
        ]
        assert zombies == []


def _zombie_of(entry: Path, parent: int) -> bool:
    try:
        state, ppid = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return False
    return state == "Z" and int(ppid) == parent
