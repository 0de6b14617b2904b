"""The backend `external` against a server of its contract."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator
from typing import ClassVar

import pytest

from hiver_storage.external import ExternalFileSystem
from hiverd.contracts.filesystem import FileSystem
from hiverd.testing.filesystem import Deviation, FileSystemSuite, Harness
from hiverd.testing.filesystem_harness import entries, get, put, shown, tree
from hiverd.testing.filesystem_reading import ReadingSuite
from support.fake_external import FakeExternal
from support.fake_http import Call


class ExternalHarness(Harness):
    deviations: ClassVar[frozenset[Deviation]] = frozenset({"no-prefix", "implied-directories"})
    secrets = ("the-password",)
    many = 150
    big_bytes = 6 << 20

    def __init__(self, service: FakeExternal) -> None:
        self.service = self.faults = service
        service.credentials = "someone:the-password"

    def build(self, prefix: str = "") -> ExternalFileSystem:
        host = f"http://someone:the-password@{self.service.address}/"
        files = ExternalFileSystem({"mount": "/m", "backend": "external", "host": host})
        files.patience.seconds = 1.0
        return files


@pytest.fixture
def service() -> Iterator[FakeExternal]:
    with FakeExternal() as service:
        yield service


@pytest.fixture
def harness(service: FakeExternal) -> ExternalHarness:
    return ExternalHarness(service)


class TestExternal(FileSystemSuite):
    @pytest.fixture
    def harness(self, service: FakeExternal) -> Harness:
        return ExternalHarness(service)


class TestExternalWithoutRanges(ReadingSuite):
    @pytest.fixture
    def harness(self, service: FakeExternal) -> Harness:
        service.honours_ranges = False
        return ExternalHarness(service)

    @pytest.fixture
    async def files(self, harness: Harness) -> AsyncIterator[FileSystem]:
        async with harness.opened() as files:
            yield files


async def test_a_wrong_password_is_a_permission_error(harness: ExternalHarness, service: FakeExternal) -> None:
    service.credentials = "someone:else"
    async with harness.opened() as files:
        with pytest.raises(PermissionError) as caught:
            await entries(files, "/")
        harness.require_no_secret(shown(caught.value) + repr(files))


async def test_round_trips(harness: ExternalHarness, service: FakeExternal) -> None:
    for number in range(500):
        service.put(f"/d/f{number}", b"content")
    async with harness.opened() as files:
        assert len(await entries(files, "/d")) == 500
        assert service.counts == {"GET directory": 1}
        assert await get(files, "/d/f7") == b"content"
        assert service.counts == {"GET directory": 1, "GET file": 1}


@pytest.mark.parametrize("honours_ranges", [True, False])
async def test_a_read_goes_on_after_cuts(harness: ExternalHarness, service: FakeExternal, honours_ranges: bool) -> None:
    service.honours_ranges = honours_ranges
    body = random.Random(2).randbytes(8 << 20)
    service.put("/big", body)
    async with harness.opened() as files:
        received = bytearray()
        service.cut_bytes = 3 << 20
        async for piece in files.read("/big", 1 << 20, (7 << 20) - 3):
            received += piece
            if len(received) == 2 << 20:
                service.cut_bytes = 1 << 20
        assert received == body[1 << 20 : -3]
    assert service.counts["GET file"] == 3


async def test_a_file_that_changes_while_it_is_read_is_never_mixed(
    harness: ExternalHarness, service: FakeExternal
) -> None:
    service.put("/big", b"o" * (8 << 20))
    async with harness.opened() as files:
        received = bytearray()

        async def take() -> None:
            service.cut_bytes = 3 << 20
            async for piece in files.read("/big", 0, None):
                received.extend(piece)
                service.put("/big", b"n" * (8 << 20))

        with pytest.raises(OSError, match="changed"):
            await take()
        assert set(received) == set(b"o")


async def test_a_file_that_changes_just_before_a_read_goes_on(harness: ExternalHarness, service: FakeExternal) -> None:
    service.put("/big", b"o" * (8 << 20))

    def theirs(call: Call) -> None:
        if service.counts["GET file"] == 2 and service.kind(call) == "GET file":
            service.put("/big", b"n" * (8 << 20))

    async with harness.opened() as files:
        service.cut_bytes = 3 << 20
        service.before = theirs
        with pytest.raises(OSError, match="changed"):
            await get(files, "/big")


async def test_directories_that_were_made_are_remembered(harness: ExternalHarness, service: FakeExternal) -> None:
    async with harness.opened() as files:
        await files.make_directory("/a/b")
        assert service.files == {}
        await put(files, "/a/b/f", b"x")
        await files.delete("/a/b/f")
        assert await tree(files) == {"/a": None, "/a/b": None}
        await files.move("/a", "/c")
        assert await tree(files) == {"/c": None, "/c/b": None}
        for path in ("/c/b", "/c"):
            await files.delete(path)
        assert await tree(files) == {}


async def test_names_that_are_no_text_are_refused(harness: ExternalHarness) -> None:
    async with harness.opened() as files:
        with pytest.raises(OSError, match="UTF-8"):
            await put(files, "/odd\udcff", b"x")


async def test_entries_that_are_not_of_the_directory_are_not_shown(
    harness: ExternalHarness, service: FakeExternal
) -> None:
    """A server that answers with more, or with paths that lead out."""
    service.put("/d/f", b"x")
    listing = {"entries": [{**service.info(path), "path": path} for path in ("/d/f", "/other", "/d", "/d/e/g")]}
    service.listing = listing
    async with harness.opened() as files:
        assert set(await entries(files, "/d")) == {"/d/f"}
        listing["entries"][0]["path"] = "/d/../x"
        with pytest.raises(OSError, match="not understood"):
            await entries(files, "/d")
