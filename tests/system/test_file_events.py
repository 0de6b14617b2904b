"""Accesses of native mounts on record, as PROTOCOL 6.3 has them: a real kernel, a real sandbox."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import MakeServer
from support.plain import plain_client
from support.server import Server
from support.waiting import until_async

pytestmark = pytest.mark.system

Pair = tuple[str, str]
Made = Callable[[], str]


class Agent:
    """A sandbox, and what its event stream has told since one last looked."""

    def __init__(self, http: httpx.AsyncClient, key: str, base: str) -> None:
        self._http = http
        self.key = key
        self.base = base
        self._position = 0

    @classmethod
    async def create(cls, http: httpx.AsyncClient, key: str, **config: object) -> Agent:
        answer = await http.post(f"/v1/sandboxes/{key}", json=config, headers={"x-hiver-key": key})
        assert answer.status_code in {200, 201}, answer.text
        return cls(http, key, f"/sandbox/{answer.json()['id']}/v1/{key}")

    async def run(self, command: str) -> str:
        answer = await self._http.post(f"{self.base}/exec", json={"command": command}, timeout=120)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["stdout"])

    async def events(self) -> list[dict[str, Any]]:
        """What is new on record."""
        url = f"{self.base}/events?lastEventId={self._position}&follow=false"
        answer = await self._http.get(url, timeout=120)
        found = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
        self._position = max([self._position, *(event["id"] for event in found)])
        return found

    async def accesses(self) -> list[Pair]:
        """(operation, path) of what is new; each request has to be followed by its response."""
        found = await self.events()
        answered = {event["request_id"]: event for event in found if event["type"] == "fs.response"}
        pairs = []
        for event in found:
            if event["type"] == "fs.request":
                answer = answered.pop(event["id"])
                assert answer["id"] > event["id"]
                assert (answer["backend"], "error" in answer, event["access"]) == ("local", False, "allowed")
                pairs.append((event["operation"], event["path"]))
        assert not answered
        return pairs

    async def after(self, command: str) -> list[Pair]:
        """The accesses that a command makes."""
        await self.accesses()
        await self.run(command)
        return await self.accesses()


@pytest.fixture
async def agent(http: httpx.AsyncClient, new_key: Made) -> Agent:
    return await Agent.create(http, new_key())


CASES = [
    ("touch {w}/a", []),
    ("echo x > {w}/a", ["write a"]),
    (": > {w}/empty", []),
    ("cat {w}/old", ["read old"]),
    ("ls {w} {w}/dir", ["read .", "read dir"]),
    ("mkdir {w}/new", ["write new"]),
    ("ln -s old {w}/link", ["write link"]),
    ("ln {w}/old {w}/hard", ["write hard"]),
    ("rm {w}/old", ["delete old"]),
    ("rmdir {w}/hollow", ["delete hollow"]),
    ("mv {w}/old {w}/dir/renamed", ["delete old", "write dir/renamed"]),
    ("mv {w}/dir {w}/moved; cat {w}/moved/inner", ["delete dir", "write moved", "read moved/inner"]),
    ("cp {w}/old {w}/copy", ["read old", "write copy"]),
    ("mkdir -p {w}/x/y; echo 1 > {w}/x/y/z", ["write x", "write x/y", "write x/y/z"]),
    ("rm -r {w}/dir", ["read dir", "delete dir/inner", "delete dir"]),
    ("mkdir {w}/q; echo 1 > {w}/q/f; rm -r {w}/q", ["write q", "write q/f", "read q", "delete q/f", "delete q"]),
    ("echo more >> {w}/old", ["write old"]),
    ("cd {w}; cat < old > dir/inner", ["read old", "write dir/inner"]),
    ("dd if={w}/old of={w}/d bs=1 count=3", ["read old", "write d"]),
    ("cat {w}/none; stat {w}/old; test -x {w}/old; readlink {w}/old; chmod 600 {w}/old", []),
]


@pytest.mark.parametrize(("command", "expected"), CASES, ids=[command for command, _ in CASES])
async def test_operations(agent: Agent, command: str, expected: list[str]) -> None:
    await agent.run("cd /workspace; echo old > old; mkdir dir hollow; echo inner > dir/inner")
    found = await agent.after(command.format(w="/workspace"))
    wanted = [tuple(line.split()) for line in expected]
    wanted = [(operation, f"/workspace/{path}".removesuffix("/.")) for operation, path in wanted]
    # Opening empties a file before anything is written: on a busy host these are told in two rounds.
    assert sorted(set(found)) == sorted(wanted)


async def test_each_mount_has_its_own_paths_and_the_rest_has_none(http: httpx.AsyncClient, new_key: Made) -> None:
    everything = [{"path": "/**", "access": "rw"}]
    mounts = [{"backend": "local", "mount": mount, "acls": everything} for mount in ("/workspace", "/srv/data x")]
    agent = await Agent.create(http, new_key(), fs=mounts)
    found = await agent.after(
        "echo 1 > /workspace/f; echo 1 > '/srv/data x/f'; echo 1 > /srv/f; mkdir /root/d /tmp/d;"
        " mv /workspace/f /root/g"
    )
    assert found == [
        ("write", "/workspace/f"),
        ("write", "/srv/data x/f"),
        ("read", "/workspace/f"),
        ("delete", "/workspace/f"),
    ]
    mount_of = {event["path"]: event["mount"] for event in await _all_events(agent) if event["type"] == "fs.request"}
    assert mount_of["/srv/data x/f"] == "/srv/data x"


async def _all_events(agent: Agent) -> list[dict[str, Any]]:
    agent._position = 0
    return await agent.events()


async def test_odd_names(agent: Agent) -> None:
    found = await agent.after(
        r"""cd /workspace; printf 1 > "$(printf 'a\nb')"; printf 1 > "$(printf '\377x')"; printf 1 > 'é"\ '; """
        r"""mkdir 'gone (deleted)'; printf 1 > 'gone (deleted)/f'"""
    )
    paths = [path.removeprefix("/workspace/") for _, path in found]
    assert paths == ["a\nb", "\ufffdx", 'é"\\ ', "gone (deleted)", "gone (deleted)/f"]


async def test_a_deep_tree(agent: Agent) -> None:
    """Deeper than a path may be long."""
    deep = "d" * 200
    script = f"import os\nos.chdir('/workspace')\nfor _ in range(40):\n os.mkdir('{deep}'); os.chdir('{deep}')\n"
    await agent.run(f"python3 -c \"{script}open('f', 'w').write('x')\"")
    found = await agent.accesses()
    assert ("write", "/workspace/" + "/".join([deep] * 10)) in found
    assert len([path for operation, path in found if path.endswith("/f")]) == 1


async def test_every_file_of_a_tree(agent: Agent) -> None:
    """Made, read and removed at once, faster than anything is looked at."""
    await agent.after("true")
    await agent.run(
        "cd /workspace; for d in $(seq 50); do mkdir -p t/$d; for f in $(seq 20); do echo $f > t/$d/$f; done; done"
    )
    await agent.run("cd /workspace; grep -r nothing t; rm -r t")
    found = set(await agent.accesses())
    files = [f"/workspace/t/{d}/{f}" for d in range(1, 51) for f in range(1, 21)]
    assert {(operation, path) for operation in ("write", "read", "delete") for path in files} <= found
    folders = [f"/workspace/t/{d}" for d in range(1, 51)]
    assert {(operation, path) for operation in ("write", "read", "delete") for path in folders} <= found


async def test_a_tree_that_is_removed_before_anybody_looks(agent: Agent) -> None:
    """Directories that were never seen before and are gone now are known by their removal."""
    await agent.run("cd /workspace; mkdir -p t/a/b/c; touch t/a/b/c/f t/a/g; mkdir m; mv m n")  # which forgets places
    found = await agent.after("rm -r /workspace/t")
    assert {("delete", f"/workspace/t{rest}") for rest in ("/a/b/c/f", "/a/g", "/a/b/c", "/a/b", "/a", "")} <= set(
        found
    )


async def test_the_file_api_is_on_record_once(agent: Agent, http: httpx.AsyncClient) -> None:
    await agent.accesses()
    await http.post(f"{agent.base}/file/workspace/up", content=b"x" * 100_000)
    assert await agent.accesses() == [("write", "/workspace/up")]
    await http.get(f"{agent.base}/file/workspace/up")
    assert await agent.accesses() == [("read", "/workspace/up")]
    await http.get(f"{agent.base}/directories?path=/workspace")
    assert await agent.accesses() == [("read", "/workspace")]
    await http.delete(f"{agent.base}/file/workspace/up")
    assert await agent.accesses() == [("delete", "/workspace/up")]
    await http.get(f"{agent.base}/directories?path=/tmp")
    assert await agent.accesses() == []


async def test_soon_and_without_being_asked(agent: Agent, http: httpx.AsyncClient) -> None:
    """An open stream tells within a moment."""
    await agent.accesses()
    url = f"{agent.base}/events?lastEventId={agent._position}"
    async with http.stream("GET", url) as stream:
        await agent.run("sleep 0.2; echo x > /workspace/f")
        answered = time.monotonic()
        async for line in stream.aiter_lines():
            if '"fs.request"' in line:
                break
    assert time.monotonic() - answered < 0.5


async def _apply(http: httpx.AsyncClient, agent: Agent, config: dict[str, object]) -> None:
    answer = await http.put(f"{agent.base}/config", json=config)
    assert answer.status_code == 200, answer.text
    assert "error" not in answer.json(), answer.text


def marked(server: Server) -> int:
    """How many file systems the server watches (proc_pid_fdinfo(5))."""
    count = 0
    for info in Path(f"/proc/{server.pid}/fdinfo").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            count += sum(line.startswith("fanotify sdev:") for line in info.read_text().splitlines())
    return count


async def test_the_filter_is_followed(server: Server, http: httpx.AsyncClient, new_key: Made) -> None:
    """What nobody wants to know costs nothing: there is no mark."""
    before = marked(server)
    agent = await Agent.create(http, new_key(), events=["stdio"])
    assert await agent.after("echo x > /workspace/f") == []
    assert marked(server) == before
    await _apply(http, agent, {"events": ["fs.request", "fs.response"]})
    assert await agent.after("echo x > /workspace/f") == [("write", "/workspace/f")]
    assert marked(server) == before + 1
    await _apply(http, agent, {"events": ["stdio"]})
    assert await agent.after("echo x > /workspace/f") == []
    assert marked(server) == before


async def test_mounts_that_come_and_go(http: httpx.AsyncClient, new_key: Made) -> None:
    agent = await Agent.create(http, new_key())
    workspace, other = ({"backend": "local", "mount": mount} for mount in ("/workspace", "/other"))
    await _apply(http, agent, {"fs": [workspace, other]})
    found = await agent.after("echo x > /workspace/f; echo x > /other/f")
    assert found == [("write", "/workspace/f"), ("write", "/other/f")]
    await _apply(http, agent, {"fs": [workspace]})
    assert await agent.after("echo x > /workspace/f; mkdir -p /other; echo x > /other/f") == [("write", "/workspace/f")]


async def test_what_was_opened_before_and_unnamed_files(agent: Agent) -> None:
    """Descriptors, unlinked files and mounts of the agent's own making lead around nothing."""
    await agent.run("echo x > /workspace/f; mkdir /workspace/d")
    found = await agent.after(
        "cd /workspace/d; exec 3>>f; mv /workspace/d /workspace/e; echo 1 >&3; rm f; echo 2 >&3; ls ."
    )
    # The kernel merges what happens to one file before it is read, under the name that it had first.
    assert {("write", "/workspace/d/f"), ("write", "/workspace/e/f")} & set(found)
    moved = [pair for pair in found if pair[1] in {"/workspace/d", "/workspace/e"}]
    assert moved[:2] == [("delete", "/workspace/d"), ("write", "/workspace/e")]
    assert ("read", "/workspace/e") in found


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with plain_client(base_url=server.url, timeout=30) as client:
        yield client


async def test_a_server_that_is_killed(make_server: MakeServer) -> None:
    """The next one watches again; the mark of the first goes with it, and nothing keeps the volume."""
    server = make_server(ephemeral=False)
    server.start()
    async with connected(server) as http:
        agent = await Agent.create(http, "kept")
        assert await agent.after("echo x > /workspace/f") == [("write", "/workspace/f")]
    server.kill()
    server.start()
    async with connected(server) as http:
        agent = await Agent.create(http, "kept")
        assert await agent.after("echo x > /workspace/g") == [("write", "/workspace/g")]
        assert (await http.post("/controller/v1/shutdown/kept")).is_success


async def test_plain_volumes_are_not_watched(make_server: MakeServer) -> None:
    """A mark on the host's file system would tell about all of it, so their mounts are governed."""
    server = make_server(config='[files]\nvolume = "plain"\n[images]\n"hiversh/python:3.13-alpine" = "host"\n')
    server.start()
    async with connected(server) as http:
        agent = await Agent.create(http, "plain")
        assert await agent.after("echo x > /workspace/f") == [("write", "/workspace/f")]
        assert marked(server) == 0


FLOOD = """
import os, threading
os.chdir('/workspace'); os.mkdir('flood'); os.chdir('flood')
for _ in range(2): os.fork()
name = ('%d-' % os.getpid()) + 'n' * 200
for i in range(60_000):
    fd = os.open(name + str(i % 30_000), os.O_CREAT | os.O_WRONLY); os.write(fd, b'x'); os.close(fd)
"""


async def test_a_flood_is_bounded_and_not_silent(http: httpx.AsyncClient, new_key: Made) -> None:
    """The server answers meanwhile, and a neighbour's accesses are told as exactly as ever."""
    flooder, neighbour = await Agent.create(http, new_key()), await Agent.create(http, new_key())
    await http.post(f"{flooder.base}/file/tmp/flood.py", content=FLOOD.encode())
    await flooder.run("setsid sh -c 'python3 /tmp/flood.py; echo done > /tmp/done' > /dev/null 2>&1 < /dev/null &")
    slowest = 0.0
    for number in range(20):
        began = time.monotonic()
        found = await neighbour.after(f"echo x > /workspace/f{number}")
        slowest = max(slowest, time.monotonic() - began)
        assert found == [("write", f"/workspace/f{number}")]
    assert slowest < 10

    async def ended() -> bool:
        return await flooder.run("cat /tmp/done 2>/dev/null") == "done\n"

    await until_async(ended, seconds=120, what="the flood ends")

    async def last() -> bool:
        await flooder.run("echo x > /workspace/last")
        return any(event.get("path") == "/workspace/last" for event in await flooder.events())

    await until_async(last, seconds=60, what="accesses are told by name again")
