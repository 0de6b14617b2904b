"""The backend `gdrive` against a Drive of our own that speaks Drive's API."""

from __future__ import annotations

import errno
import json
import random
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hiver_storage.gdrive import GDriveFileSystem
from hiverd.contracts.filesystem import ABSENT, VersionConflictError
from hiverd.testing.filesystem import FailureKind, FileSystemSuite, Harness
from hiverd.testing.filesystem_harness import each, entries, get, pieces, put, tree
from support.fake_drive import FOLDER, FakeDrive
from support.fake_http import Call


class DriveHarness(Harness):
    secrets = ("token-0", "token-1", "refresh-0", "the-client-secret")
    many = 60
    big_bytes = 9 << 20

    def __init__(self, service: FakeDrive) -> None:
        self.service = self.faults = service
        service.page_size = 25

    def build(self, prefix: str = "", **members: str) -> GDriveFileSystem:
        config = {
            "mount": "/m",
            "backend": "gdrive",
            "gdrive_access_token": "token-0",
            "gdrive_refresh_token": "refresh-0",
            "gdrive_client_id": "the-client",
            "gdrive_client_secret": "the-client-secret",
            "gdrive_prefix": prefix,
        }
        files = GDriveFileSystem({**config, **members})
        files.patience.seconds = 1.0
        return files


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDrive]:
    with FakeDrive() as service:
        monkeypatch.setenv("HIVE_GDRIVE_API_URL", service.url)
        monkeypatch.setenv("HIVE_GDRIVE_TOKEN_URL", f"{service.url}token")
        yield service


@pytest.fixture
def harness(service: FakeDrive) -> DriveHarness:
    return DriveHarness(service)


class TestDrive(FileSystemSuite):
    @pytest.fixture
    def harness(self, service: FakeDrive) -> Harness:
        return DriveHarness(service)


# -- what a mount shows -----------------------------------------------------------------------------------------------


async def test_files_of_one_name_and_names_with_slashes(harness: DriveHarness, service: FakeDrive) -> None:
    old, new, slash = service.add("a.txt", b"old"), service.add("a.txt", b"new"), service.add("1/2", b"half")
    async with harness.opened() as files:
        shown = f"/a ({old.id}).txt"
        assert await tree(files) == {"/a.txt": b"new", shown: b"old", "/1\uf02f2": b"half"}
        await put(files, "/a.txt", b"newer", (await files.stat("/a.txt")).version)
        assert (old.data, new.data) == (b"old", b"newer")
        await files.move(shown, "/first.txt")
        assert old.name == "first.txt"
        await files.move("/1\uf02f2", "/d/3\uf02f4")
        assert slash.name == "3/4"
        assert await tree(files) == {"/a.txt": b"newer", "/first.txt": b"old", "/d": None, "/d/3\uf02f4": b"half"}


async def test_no_file_has_a_second_name(harness: DriveHarness, service: FakeDrive) -> None:
    """A rule that denies `/secret.txt` is not passed by."""
    secret = service.add("secret.txt", b"secret")
    async with harness.opened() as files:
        for name in (f"secret ({secret.id}).txt", f"x ({secret.id})", f"secret.txt ({secret.id})", "SECRET.txt"):
            with pytest.raises(FileNotFoundError):
                await files.stat(f"/{name}")


async def test_documents_are_small_files_that_nobody_writes(harness: DriveHarness, service: FakeDrive) -> None:
    plan = service.add("Plan", None, mime_type="application/vnd.google-apps.document")
    async with harness.opened() as files:
        looked = await files.stat("/Plan.gdoc")
        assert set(await entries(files, "/")) == {"/Plan.gdoc"}
        body = await get(files, "/Plan.gdoc")
        assert plan.id.encode() in body
        assert (looked.size, await get(files, "/Plan.gdoc", 3, 4)) == (len(body), body[3:7])
        for change in (put(files, "/Plan.gdoc", b"x"), files.move("/Plan.gdoc", "/Plan.txt")):
            with pytest.raises(PermissionError):
                await change
        await files.move("/Plan.gdoc", "/Other.gdoc")
        assert plan.name == "Other"


async def test_deleted_files_are_in_the_trash(harness: DriveHarness, service: FakeDrive) -> None:
    inner = service.add("d", None, mime_type=FOLDER)
    file = service.add("f", b"x", inner.id)
    async with harness.opened() as files:
        await files.delete("/d/f")
        await files.delete("/d")
        assert file.trashed
        assert inner.trashed
        assert await entries(files, "/") == {}
    assert service.counts["delete"] == 0


async def test_what_others_put_into_the_trash_or_move_is_gone(harness: DriveHarness, service: FakeDrive) -> None:
    folder = service.add("d", None, mime_type=FOLDER)
    service.add("f", b"x", folder.id)
    async with harness.opened() as files:
        assert set(await entries(files, "/d")) == {"/d/f"}
        folder.trashed = True
        for look in (entries(files, "/d"), files.stat("/d"), files.stat("/d/f")):
            with pytest.raises(FileNotFoundError):
                await look


async def test_a_prefix_is_made_when_something_is_written(harness: DriveHarness, service: FakeDrive) -> None:
    top = service.add("top", None, mime_type=FOLDER)
    files = harness.build("a/b", gdrive_folder_id=top.id)
    await files.open()
    assert (await files.stat("/")).is_dir
    assert await entries(files, "/") == {}
    assert len(service.files) == 2
    await put(files, "/f", b"x")
    (made,) = service.named("a")
    assert made.parents == [top.id]
    await files.close()


async def test_a_shared_drive(harness: DriveHarness, service: FakeDrive) -> None:
    service.shared_drive = True
    async with harness.opened() as files:
        await put(files, "/d/f", b"x")
        await files.move("/d/f", "/g")
        await put(files, "/g", bytes(9 << 20))
        await files.symlink("/l", "g")
        await files.delete("/g")
        assert await tree(files) == {"/d": None, "/l": "g"}


# -- requests ---------------------------------------------------------------------------------------------------------


async def test_round_trips(harness: DriveHarness, service: FakeDrive) -> None:
    service.page_size = 1000
    for number in range(2500):
        service.add(f"f{number}", b"content")
    async with harness.opened() as files:
        service.counts.clear()
        assert len(await entries(files, "/")) == 2500
        assert service.counts == {"list": 3}
        assert await get(files, "/f7") == b"content"
        assert service.counts == {"list": 3, "media": 1}
        service.counts.clear()
        await files.stat("/f8")
        assert service.counts == {"list": 1}
        await put(files, "/f8", b"x")
        assert service.counts == {"list": 2, "upload multipart": 1}


async def test_the_token_expires_in_the_middle_of_a_read(harness: DriveHarness, service: FakeDrive) -> None:
    body = random.Random(1).randbytes(20 << 20)
    service.add("big", body)
    async with harness.opened() as files:
        received = bytearray()
        async for piece in files.read("/big", 5, len(body) - 10):
            received += piece
            if len(received) in (1 << 20, 12 << 20):
                service.expire_token()
        assert received == body[5:-5]
    assert service.counts["token"] == 2


async def test_of_many_that_need_a_token_one_fetches_it(harness: DriveHarness, service: FakeDrive) -> None:
    for number in range(30):
        service.add(f"f{number}", b"%d" % number)
    async with harness.opened() as files:
        service.expire_token()
        await each(files.stat(f"/f{number}") for number in range(30))
    assert service.counts["token"] == 1


async def test_no_refresh_token(harness: DriveHarness, service: FakeDrive) -> None:
    files = harness.build(gdrive_refresh_token="")
    await files.open()
    assert await entries(files, "/") == {}
    service.expire_token()
    with pytest.raises(PermissionError):
        await entries(files, "/")
    await files.close()


async def test_a_token_service_in_trouble_is_no_refusal(harness: DriveHarness, service: FakeDrive) -> None:
    async with harness.opened() as files:
        service.expire_token()
        service.looked = lambda call: service.fail("503", 1) if service.kind(call) == "token" else None
        with pytest.raises(BlockingIOError):
            await entries(files, "/")
        service.looked = None
        service.fail("503", 0)
        assert await entries(files, "/") == {}


async def test_a_service_account(harness: DriveHarness, service: FakeDrive) -> None:
    service.account_email = "robot@project.example"
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    document = {
        "type": "service_account",
        "client_email": service.account_email,
        "private_key": pem,
        "private_key_id": "1",
        "client_id": "2",
        "token_uri": "http://127.0.0.1:1/elsewhere",
    }
    files = harness.build(gdrive_service_account_json=json.dumps(document), gdrive_access_token="")
    await files.open()
    await put(files, "/f", b"x")
    service.expire_token()
    assert await tree(files) == {"/f": b"x"}
    assert service.counts["token"] == 2
    await files.close()


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("insufficientFilePermissions", errno.EACCES),
        ("storageQuotaExceeded", errno.ENOSPC),
        ("rateLimitExceeded", errno.EAGAIN),
    ],
)
async def test_refusals(harness: DriveHarness, service: FakeDrive, reason: str, expected: int) -> None:
    async with harness.opened() as files:
        service.rate_reason = reason
        service.fail("429", 1000)
        with pytest.raises(OSError, match=reason) as caught:
            await put(files, "/f", b"x")
        assert caught.value.errno == expected
    assert service.counts.total() == 1 or expected == errno.EAGAIN


# -- trouble ----------------------------------------------------------------------------------------------------------


async def test_a_read_goes_on_after_a_cut(harness: DriveHarness, service: FakeDrive) -> None:
    body = random.Random(2).randbytes(18 << 20)
    service.add("big", body)
    async with harness.opened() as files:
        received = bytearray()
        async for piece in files.read("/big", 0, None):
            received += piece
            if len(received) in (1 << 20, 9 << 20):
                service.cut_bytes = 1 << 20
        assert received == body
    assert service.counts["media"] == 5


async def test_a_file_that_changes_while_it_is_read_is_never_mixed(harness: DriveHarness, service: FakeDrive) -> None:
    old, new = b"o" * (20 << 20), b"n" * (20 << 20)
    file = service.add("big", old)
    async with harness.opened() as files:
        received = bytearray()

        async def take() -> None:
            async for piece in files.read("/big", 0, None):
                received.extend(piece)
                if len(received) == 1 << 20:
                    service.set_data(file, new)

        with pytest.raises(OSError, match="changed"):
            await take()
        assert set(received) == set(b"o")
        assert await get(files, "/big") == new


async def test_another_writes_in_the_moment_before_us(harness: DriveHarness, service: FakeDrive) -> None:
    """Nobody's content is lost: theirs is there, and we are told."""
    file = service.add("f", b"first")
    async with harness.opened() as files:
        version = (await files.stat("/f")).version

        def theirs(call: Call) -> None:
            if service.kind(call).startswith("upload") and len(file.revisions) == 1:
                service.set_data(file, b"theirs")

        service.before = theirs
        with pytest.raises(VersionConflictError):
            await put(files, "/f", b"ours", version)
        assert await get(files, "/f") == b"theirs"


async def test_another_makes_the_file_in_the_moment_before_us(harness: DriveHarness, service: FakeDrive) -> None:
    async with harness.opened() as files:

        def theirs(call: Call) -> None:
            if service.kind(call).startswith("upload") and not service.named("f"):
                service.add("f", b"theirs")

        service.before = theirs
        with pytest.raises(VersionConflictError):
            await put(files, "/f", b"ours", ABSENT)
        assert await tree(files) == {"/f": b"theirs"}


async def test_two_make_a_folder_at_once(harness: DriveHarness, service: FakeDrive) -> None:
    async with harness.opened() as files:

        def theirs(call: Call) -> None:
            if service.kind(call) == "create" and not service.named("d"):
                service.add("d", None, mime_type=FOLDER)

        service.before = theirs
        await put(files, "/d/f", b"x")
        assert len(service.named("d")) == 1
        assert await tree(files) == {"/d": None, "/d/f": b"x"}


@pytest.mark.parametrize("kind", ["cut", "lost-answer", "503"])
async def test_an_upload_in_chunks_goes_on(harness: DriveHarness, service: FakeDrive, kind: FailureKind) -> None:
    """Each chunk's first attempt fails, and the service takes parts of chunks."""
    body = random.Random(4).randbytes((17 << 20) + 5)
    service.max_chunk = 5 << 20
    failed: set[str] = set()

    def trouble(call: Call) -> None:
        span = call.headers.get("content-range", "*")
        if "*" not in span and span not in failed:
            failed.add(span)
            service.fail(kind, 1)

    async with harness.opened() as files:
        files.patience.seconds = 10
        service.looked = trouble
        written = await files.write("/big", pieces(body[:100], body[100:]), size=len(body), expected_version=ABSENT)
        service.looked = None
        assert written.size == len(body)
        (file,) = service.named("big")
        assert file.data == body
    assert len(failed) >= 4


async def test_a_repeated_request_makes_no_second_file(harness: DriveHarness, service: FakeDrive) -> None:
    async with harness.opened() as files:

        def trouble(call: Call) -> None:
            if service.kind(call) in ("upload multipart", "create") and service.counts[service.kind(call)] == 1:
                service.fail("lost-answer", 1)

        service.looked = trouble
        await put(files, "/d/f", b"x")
    assert len(service.named("f")) == len(service.named("d")) == 1


async def test_our_own_write_is_no_conflict(harness: DriveHarness, service: FakeDrive) -> None:
    """The answer is lost, and the version is another one when we ask again."""

    def trouble(call: Call) -> None:
        if service.kind(call) in ("upload multipart", "chunk") and service.counts[service.kind(call)] in (1, 2):
            service.fail("lost-answer", 1)

    async with harness.opened() as files:
        version: str | None = ABSENT
        for body in (b"one", b"two", bytes(9 << 20)):
            service.counts.clear()
            service.looked = trouble
            version = (await put(files, "/f", body, version)).version
            service.looked = None
            assert await get(files, "/f") == body
    assert len(service.named("f")) == 1
