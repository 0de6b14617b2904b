"""A sandbox that swaps a directory or a file for a link, all the time, while the server reads, writes and deletes."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from unit.files.namespaced import NamespacedRoot
from unit.files.rig import FakeSandbox, NamespacedWorkload, client_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces")

SECRET = "the host's secret"
RACE_SECONDS = 1.5


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of the host's, readable and writable for everybody, with a canary in it."""
    folder = tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    (folder / "canary").write_text(SECRET)
    for path in (folder, folder / "sub", folder / "canary"):
        path.chmod(0o777)
    return folder


@pytest.fixture
def inside(tmp_path: Path, outside: Path) -> Iterator[NamespacedRoot]:
    with NamespacedRoot(tmp_path) as root:
        yield root
        assert (outside / "canary").read_text() == SECRET
        assert sorted(os.listdir(outside)) == ["canary", "sub"]
        assert os.listdir(outside / "sub") == []


@pytest.fixture
async def client(inside: NamespacedRoot) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(FakeSandbox(NamespacedWorkload(inside))) as client:
        yield client


def swap(inside: NamespacedRoot, first: str, second: str) -> None:
    """Exchanges two names inside as fast as a process can, until the namespace ends."""
    inside.run(f"""
if not os.fork():
    libc.prctl(1, 9)
    exchange_forever({first!r}, {second!r})
""")


async def hammer(client: httpx.AsyncClient, requests: list[tuple[str, str]]) -> dict[tuple[str, str], Counter[int]]:
    """Sends the requests over and over for a while; the statuses of each."""
    statuses: dict[tuple[str, str], Counter[int]] = {request: Counter() for request in requests}
    deadline = time.monotonic() + RACE_SECONDS

    async def repeat(method: str, url: str) -> None:
        while time.monotonic() < deadline:
            answer = await client.request(method, url, content=b"evil" if method == "POST" else None)
            assert SECRET not in answer.text, url
            assert "canary-of-the-host" not in answer.text
            assert answer.status_code < 500, answer.text
            statuses[method, url][answer.status_code] += 1

    async with asyncio.TaskGroup() as group:
        for method, url in requests:
            group.create_task(repeat(method, url))
    return statuses


@pytest.mark.parametrize("climb", ["{outside}", "../../../../../../../../../..{outside}", "/proc/1/root{outside}"])
async def test_a_directory_becomes_a_link(
    client: httpx.AsyncClient, inside: NamespacedRoot, outside: Path, climb: str
) -> None:
    target = climb.format(outside=outside)
    inside.run(f"os.makedirs('/hiver-data/dir/sub'); os.symlink({target!r}, '/hiver-data/link')")
    inside.run("open('/hiver-data/dir/canary', 'w').write('inside')")
    swap(inside, "/hiver-data/dir", "/hiver-data/link")
    statuses = await hammer(
        client,
        [
            ("GET", "/file/hiver-data/dir/canary"),
            ("POST", "/file/hiver-data/dir/sub/written"),
            ("POST", "/file/hiver-data/dir/new/deep/written"),
            ("POST", "/file/hiver-data/dir/canary"),
            ("DELETE", "/file/hiver-data/dir/sub/written"),
            ("DELETE", "/file/hiver-data/dir/canary"),
            ("GET", "/directories?path=/hiver-data/dir"),
        ],
    )
    # Both states were met, so that the race was one.
    assert statuses["GET", "/directories?path=/hiver-data/dir"].keys() == {200, 404 if "proc" not in climb else 400}
    assert {200, 204} & set().union(*(counter.keys() for counter in statuses.values()))


async def test_a_file_becomes_a_link(client: httpx.AsyncClient, inside: NamespacedRoot, outside: Path) -> None:
    """Planted anew all the time, as an upload replaces what it finds."""
    inside.run(f"""
os.mkdir('/hiver-data/d')
if not os.fork():
    libc.prctl(1, 9)
    while True:
        os.symlink('{outside}/canary', '/hiver-data/l')
        os.rename('/hiver-data/l', '/hiver-data/d/file')
        with open('/hiver-data/f', 'w') as file:
            file.write('inside')
        os.rename('/hiver-data/f', '/hiver-data/d/file')
""")
    url = "/file/hiver-data/d/file"
    statuses = await hammer(
        client, [("GET", url), ("POST", url), ("DELETE", url), ("GET", "/directories?path=/hiver-data/d")]
    )
    assert {200, 404} <= statuses["GET", url].keys()
    assert {200, 404} <= statuses["POST", url].keys()


async def test_a_file_becomes_a_fifo(client: httpx.AsyncClient, inside: NamespacedRoot) -> None:
    """A server that opened the FIFO would hang there for ever."""
    inside.run(
        "os.mkdir('/hiver-data/d'); open('/hiver-data/d/file', 'w').write('inside'); os.mkfifo('/hiver-data/d/fifo')"
    )
    swap(inside, "/hiver-data/d/file", "/hiver-data/d/fifo")
    async with asyncio.timeout(RACE_SECONDS + 5):
        statuses = await hammer(client, [("GET", "/file/hiver-data/d/file"), ("GET", "/file/hiver-data/d/fifo")])
    assert {200, 404} == statuses["GET", "/file/hiver-data/d/file"].keys()


async def test_a_directory_is_moved_out_of_the_way(client: httpx.AsyncClient, inside: NamespacedRoot) -> None:
    """`..` behind a link while the directory in between moves: the kernel asks to try again, and must not leak out."""
    inside.run("""
os.makedirs('/hiver-data/a/b/c'); os.makedirs('/hiver-data/x')
os.symlink('../../../../../../../../../../etc', '/hiver-data/a/b/c/up')
os.symlink('b/c/up', '/hiver-data/a/link')
""")
    swap(inside, "/hiver-data/a/b/c", "/hiver-data/x")
    paths = ("a/link/passwd", "a/b/c/up/passwd", "a/b/c/up")
    statuses = await hammer(client, [("GET", f"/file/hiver-data/{path}") for path in paths])
    # Inside there is no /etc.
    assert all(200 not in counter for counter in statuses.values())


async def test_the_directory_moves_while_a_file_is_received(
    client: httpx.AsyncClient, inside: NamespacedRoot, outside: Path
) -> None:
    """What was found when the upload began is where the file ends, wherever that is by then inside."""
    inside.run(f"os.mkdir('/hiver-data/d'); os.symlink('{outside}', '/hiver-data/link')")

    async def content() -> AsyncIterator[bytes]:
        yield b"first"
        inside.run("os.rename('/hiver-data/d', '/hiver-data/moved'); os.rename('/hiver-data/link', '/hiver-data/d')")
        yield b"second"

    assert (await client.post("/file/hiver-data/d/f", content=content())).status_code == 200
    assert inside.run("result = open('/hiver-data/moved/f').read()") == "firstsecond"


async def test_the_directory_vanishes_meanwhile(client: httpx.AsyncClient, inside: NamespacedRoot) -> None:
    inside.run("os.mkdir('/hiver-data/d')")

    async def content() -> AsyncIterator[bytes]:
        yield b"first"
        inside.run("os.rmdir('/hiver-data/d')")
        yield b"second"

    assert (await client.post("/file/hiver-data/d/f", content=content())).status_code == 404
    assert inside.run("result = os.listdir('/hiver-data')") == []


async def test_the_name_becomes_a_link_meanwhile(
    client: httpx.AsyncClient, inside: NamespacedRoot, outside: Path
) -> None:
    async def content() -> AsyncIterator[bytes]:
        yield b"first"
        inside.run(f"os.symlink('{outside}/canary', '/hiver-data/f')")
        yield b"second"

    assert (await client.post("/file/hiver-data/f", content=content())).status_code == 200
    assert inside.run("result = os.path.islink('/hiver-data/f')") is False
    assert inside.run("result = open('/hiver-data/f').read()") == "firstsecond"
    assert inside.run("result = os.listdir('/hiver-data')") == ["f"]
