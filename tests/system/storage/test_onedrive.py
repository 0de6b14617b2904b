"""The backend `onedrive` against a Graph of our own that speaks Graph's API."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator

import pytest

from hiver_storage.onedrive import OneDriveFileSystem
from hiverd.contracts.filesystem import ABSENT, FileSystem, VersionConflictError
from hiverd.testing.filesystem import FailureKind, FileSystemSuite, Harness
from hiverd.testing.filesystem_changing import ChangingSuite
from hiverd.testing.filesystem_harness import BrokenSourceError, broken, each, entries, get, pieces, put, tree
from hiverd.testing.filesystem_links import LinkSuite
from hiverd.testing.filesystem_writing import WritingSuite
from support.fake_graph import FakeGraph
from support.fake_http import Call


class GraphHarness(Harness):
    secrets = ("token-0", "token-1", "refresh-0", "refresh-1", "the-client-secret", "the-tempauth")
    many = 60
    big_bytes = 11 << 20

    def __init__(self, service: FakeGraph) -> None:
        self.service = self.faults = service
        service.page_size = 25

    def build(self, prefix: str = "", **members: str) -> OneDriveFileSystem:
        config = {
            "mount": "/m",
            "backend": "onedrive",
            "onedrive_access_token": "token-0",
            "onedrive_refresh_token": "refresh-0",
            "onedrive_client_id": "the-client",
            "onedrive_client_secret": "the-client-secret",
            "onedrive_prefix": prefix,
        }
        files = OneDriveFileSystem({**config, **members})
        files.patience.seconds = 1.0
        return files


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGraph]:
    with FakeGraph() as service:
        monkeypatch.setenv("HIVE_ONEDRIVE_API_URL", f"{service.url}/v1.0")
        monkeypatch.setenv("HIVE_ONEDRIVE_TOKEN_URL", service.url)
        yield service


@pytest.fixture
def harness(service: FakeGraph) -> GraphHarness:
    return GraphHarness(service)


class TestOneDrive(FileSystemSuite):
    @pytest.fixture
    def harness(self, service: FakeGraph) -> Harness:
        return GraphHarness(service)


class TestOneDriveThatDoesLess(WritingSuite, LinkSuite, ChangingSuite):
    """A service that makes no parents, and does not replace what is in the way of a move."""

    @pytest.fixture
    def harness(self, service: FakeGraph) -> Harness:
        service.makes_parents = service.replaces_on_move = False
        return GraphHarness(service)

    @pytest.fixture
    async def files(self, harness: Harness) -> AsyncIterator[FileSystem]:
        async with harness.opened() as files:
            yield files


# -- what a mount shows -----------------------------------------------------------------------------------------------


async def test_names_that_onedrive_refuses(harness: GraphHarness, service: FakeGraph) -> None:
    names = ["a:b", "what?", "dot.", " blank ", "con", "~$lock", "x_vti_y", "desktop.ini", "ctrl\x01", "odd\udcff"]
    async with harness.opened() as files:
        for name in names:
            await put(files, f"/{name}", name.encode(errors="surrogateescape"))
        assert await tree(files) == {f"/{name}": name.encode(errors="surrogateescape") for name in names}
    assert {"a\uf03ab", "what\uf03f", "dot\uf02e"} <= service.names()


async def test_links_are_files_beside(harness: GraphHarness, service: FakeGraph) -> None:
    service.add("theirs.symlink", b"target/of theirs")
    service.add("file", b"content")
    service.add("file.symlink", b"hidden by the file")
    service.add("huge.symlink", bytes(20_000))
    async with harness.opened() as files:
        await files.symlink("/ours", "elsewhere")
        assert await tree(files) == {"/theirs": "target/of theirs", "/file": b"content", "/ours": "elsewhere"}
        assert "ours.symlink" in service.names()
        await put(files, "/ours", b"now a file")
        assert "ours.symlink" not in service.names()
        await put(files, "/name.symlink", b"a file of that name")
        assert await get(files, "/name.symlink") == b"a file of that name"
        assert "/name" not in await entries(files, "/")
        await files.delete("/file")
        assert not {"file", "file.symlink"} & service.names()


async def test_a_link_is_read_once(harness: GraphHarness, service: FakeGraph) -> None:
    for number in range(10):
        service.add(f"l{number}.symlink", b"target")
    async with harness.opened() as files:
        await entries(files, "/")
        service.counts.clear()
        await entries(files, "/")
        assert service.counts == {"GET children": 1}
        service.add("l3.symlink", b"another")
        assert (await entries(files, "/"))["/l3"].link_target == "another"


async def test_a_drive_of_a_tenant(harness: GraphHarness, service: FakeGraph) -> None:
    service.drive, service.tenant = "/drives/b!the-Drive_1", "contoso.example"
    files = harness.build("a:b", onedrive_drive_id="b!the-Drive_1", onedrive_tenant="contoso.example")
    await files.open()
    service.expire_token()
    await put(files, "/f", b"x")
    assert await tree(files) == {"/f": b"x"}
    assert service.names() == {"a\uf03ab"}
    await files.close()


async def test_only_the_case_of_a_name_changes(harness: GraphHarness, service: FakeGraph) -> None:
    async with harness.opened() as files:
        await put(files, "/name", b"x")
        await files.move("/name", "/NAME")
        assert await tree(files) == {"/NAME": b"x"}


# -- requests ---------------------------------------------------------------------------------------------------------


async def test_round_trips(harness: GraphHarness, service: FakeGraph) -> None:
    service.page_size = 999
    for number in range(2500):
        service.add(f"f{number}", b"content")
    async with harness.opened() as files:
        service.counts.clear()
        assert len(await entries(files, "/")) == 2500
        assert service.counts == {"GET children": 3}
        assert await get(files, "/f7") == b"content"
        assert service.counts == {"GET children": 3, "GET item": 1, "content": 1}
        service.counts.clear()
        await put(files, "/new", b"x", ABSENT)
        assert service.counts == {"GET item": 1, "PUT content": 1}


async def test_of_many_that_need_a_token_one_fetches_it(harness: GraphHarness, service: FakeGraph) -> None:
    """The refresh token is another one each time, and good once."""
    for number in range(30):
        service.add(f"f{number}", b"%d" % number)
    async with harness.opened() as files:
        for count in (1, 2):
            service.expire_token()
            await each(files.stat(f"/f{number}") for number in range(30))
            assert service.counts["token"] == count


async def test_no_refresh_token(harness: GraphHarness, service: FakeGraph) -> None:
    files = harness.build(onedrive_refresh_token="")
    await files.open()
    assert await entries(files, "/") == {}
    service.expire_token()
    with pytest.raises(PermissionError):
        await entries(files, "/")
    await files.close()


async def test_no_token_for_another_host(harness: GraphHarness, service: FakeGraph) -> None:
    """Neither for content nor for a page that the service says is elsewhere."""
    service.page_size = 1
    service.add("a", b"x")
    service.add("b", b"x")
    async with harness.opened() as files:
        assert await get(files, "/a") == b"x"
        await put(files, "/big", bytes(11 << 20))
        elsewhere = [call for call in service.calls if call.headers["host"].startswith("localhost")]
        assert len(elsewhere) == 3
        assert not any("authorization" in call.headers for call in elsewhere)
        service.pages_elsewhere = True
        with pytest.raises(OSError, match="next page"):
            await entries(files, "/")


# -- trouble ----------------------------------------------------------------------------------------------------------


async def test_a_read_goes_on_after_cuts_and_expired_addresses(harness: GraphHarness, service: FakeGraph) -> None:
    body = random.Random(2).randbytes(12 << 20)
    service.add("big", body)
    async with harness.opened() as files:
        received = bytearray()
        service.cut_bytes = 5 << 20
        async for piece in files.read("/big", 7, None):
            received += piece
            if len(received) == 2 << 20:
                service.expired_downloads = 1
                service.cut_bytes = 1 << 20
                service.expire_token()
        assert received == body[7:]
    assert service.counts["token"] == 1
    assert service.counts["content"] == 4


async def test_a_file_that_changes_while_it_is_read_is_never_mixed(harness: GraphHarness, service: FakeGraph) -> None:
    service.add("big", b"o" * (12 << 20))
    async with harness.opened() as files:
        received = bytearray()

        async def take() -> None:
            service.cut_bytes = 4 << 20
            async for piece in files.read("/big", 0, None):
                received.extend(piece)
                if len(received) == 1 << 20:
                    service.add("big", b"n" * (12 << 20))

        with pytest.raises(OSError, match="changed"):
            await take()
        assert set(received) == set(b"o")


@pytest.mark.parametrize("kind", ["cut", "lost-answer", "503"])
async def test_an_upload_in_chunks_goes_on(harness: GraphHarness, service: FakeGraph, kind: FailureKind) -> None:
    """Each chunk's first attempt fails, and the service takes parts of chunks."""
    body = random.Random(4).randbytes((23 << 20) + 5)
    service.max_chunk = 20 * 320 << 10
    failed: set[str] = set()

    def trouble(call: Call) -> None:
        span = call.headers.get("content-range")
        if span and span not in failed:
            failed.add(span)
            service.fail(kind, 1)

    async with harness.opened() as files:
        files.patience.seconds = 10
        service.looked = trouble
        written = await files.write("/big", pieces(body[:100], body[100:]), size=len(body), expected_version=ABSENT)
        service.looked = None
        assert written.size == len(body)
        assert await get(files, "/big") == body
    assert len(failed) >= 3


async def test_an_upload_that_ends_badly_leaves_no_session(harness: GraphHarness, service: FakeGraph) -> None:
    async with harness.opened() as files:
        with pytest.raises(BrokenSourceError):
            await files.write("/big", broken(bytes(11 << 20), b"x"), size=12 << 20, expected_version=None)
        assert service.counts["session PUT"] == 1
        assert service.open_sessions == 0


async def test_another_writes_in_the_moment_before_us(harness: GraphHarness, service: FakeGraph) -> None:
    async with harness.opened() as files:
        for path, big in (("small", 0), ("big", 11 << 20)):
            version = (await put(files, f"/{path}", b"first")).version

            def theirs(call: Call, path: str = path) -> None:
                if service.kind(call) in ("PUT content", "session PUT"):
                    service.add(path, b"theirs")

            service.before = theirs
            with pytest.raises(VersionConflictError):
                await put(files, f"/{path}", b"ours" + bytes(big), version)
            service.before = None
            assert await get(files, f"/{path}") == b"theirs"


async def test_our_own_write_is_no_conflict(harness: GraphHarness, service: FakeGraph) -> None:
    """The answer is lost, and the condition does not hold any more when we ask again."""

    def trouble(call: Call) -> None:
        if call.method == "PUT" and service.counts[service.kind(call)] == 1:
            service.fail("lost-answer", 1)

    async with harness.opened() as files:
        version: str | None = ABSENT
        for body in (b"one", b"two", bytes(11 << 20)):
            service.counts.clear()
            service.looked = trouble
            version = (await put(files, "/f", body, version)).version
            service.looked = None
            assert await get(files, "/f") == body
        service.counts.clear()
        service.looked = trouble
        service.before = lambda call: service.add("f", b"theirs") if service.counts["PUT content"] == 2 else None
        with pytest.raises(VersionConflictError):
            await put(files, "/f", b"ours", version)
