"""The backend `gcs`: the conformance suite, and what is its own, on a service of our own making."""

from __future__ import annotations

import errno
import json
import os
import random
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from hiver_storage.failures import Patience
from hiver_storage.gcs import GcsFileSystem
from hiverd.contracts.filesystem import ABSENT
from hiverd.testing.filesystem import FileSystemSuite, Harness
from hiverd.testing.filesystem_harness import (
    BrokenSourceError,
    broken,
    each,
    entries,
    get,
    put,
    require_transient,
    shown,
)
from support.fake_gcs import REWRITE_BYTES, FakeGcs
from support.faulty_proxy import FaultyProxy

QUICK = Patience(first_seconds=0.01)


class GcsFaults(FaultyProxy):
    def __init__(self, service: FakeGcs) -> None:
        super().__init__(service.port, refusal=401)
        self._service = service

    def expire_token(self) -> bool:
        self._service.tokens.clear()
        return True


class GcsHarness(Harness):
    many = 120
    faults: GcsFaults

    def __init__(self, bucket: str, service: FakeGcs, proxy: GcsFaults) -> None:
        self.bucket = bucket
        self.faults = proxy
        self._service = service
        self._account = service.service_account

    @property
    def secrets(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self._account["private_key"].splitlines()[1], *self._service.issued)

    def build(self, prefix: str = "") -> GcsFileSystem:
        files = GcsFileSystem(self.config(gcs_prefix=prefix))
        files.patience = QUICK
        files.store.page_keys = 50
        return files

    def config(self, **changes: Any) -> dict[str, Any]:
        return {
            "mount": "/data",
            "backend": "gcs",
            "gcs_bucket": self.bucket,
            "gcs_service_account_json": json.dumps(self._account),
            **changes,
        }


@pytest.fixture
def harness(gcs_service: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsHarness]:
    bucket = f"b-{uuid.uuid4().hex}"
    gcs_service.buckets[bucket] = {}
    with GcsFaults(gcs_service) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{proxy.port}")
        yield GcsHarness(bucket, gcs_service, proxy)
    del gcs_service.buckets[bucket]


class TestGcs(FileSystemSuite):
    @pytest.fixture
    def harness(self, harness: GcsHarness) -> GcsHarness:
        return harness


@pytest.fixture
async def files(harness: GcsHarness) -> AsyncIterator[GcsFileSystem]:
    async with harness.opened() as files:
        assert isinstance(files, GcsFileSystem)
        yield files


async def test_each_part_of_an_upload_may_fail(files: GcsFileSystem, harness: GcsHarness) -> None:
    """The service is asked what it has, and gets the rest."""
    body = random.Random(5).randbytes(20 << 20)
    for kind in ("503", "cut", "lost-answer"):
        for number in range(4):
            seen = 0

            async def content(kind: Any = kind, number: int = number) -> AsyncIterator[bytes]:
                nonlocal seen
                for start in range(0, len(body), 4 << 20):
                    if seen == 2 * number:
                        harness.faults.fail(kind, 1)
                    seen += 1
                    yield body[start : start + (4 << 20)]

            written = await files.write(f"/{kind}{number}", content(), size=len(body), expected_version=ABSENT)
            harness.faults.fail(kind, 0)
            assert await get(files, f"/{kind}{number}") == body
            assert (await files.stat(f"/{kind}{number}")).version == written.version


async def test_an_upload_that_fails_leaves_nothing(files: GcsFileSystem, gcs_service: FakeGcs) -> None:
    before = set(gcs_service.sessions)
    with pytest.raises(BrokenSourceError):
        await files.write("/big", broken(*[bytes(1 << 20)] * 18), size=20 << 20, expected_version=None)
    assert set(gcs_service.sessions) == before


async def test_a_large_file_is_moved_in_several_requests(files: GcsFileSystem) -> None:
    body = random.Random(6).randbytes(3 * REWRITE_BYTES + 1)
    await put(files, "/from", body)
    await files.move("/from", "/to")
    assert await get(files, "/to") == body


async def test_a_token_that_expires_in_the_middle_of_a_read(files: GcsFileSystem, harness: GcsHarness) -> None:
    body = random.Random(7).randbytes(4 << 20)
    await put(files, "/big", body)
    harness.faults.fail("short-body", 1)
    received = bytearray()
    async for piece in files.read("/big", 0, None):
        if not received:
            harness.faults.expire_token()
        received += piece
    assert received == body


async def test_a_file_that_changes_while_it_is_read(files: GcsFileSystem, harness: GcsHarness) -> None:
    """Never a mixture."""
    await put(files, "/big", b"a" * (4 << 20))
    harness.faults.fail("short-body", 1)
    reading = files.read("/big", 0, None)
    await anext(reading)
    async with harness.opened() as others:
        await put(others, "/big", b"b" * (4 << 20))
    with pytest.raises(OSError, match="changed while it was read") as caught:
        async for _ in reading:
            pass
    assert caught.value.errno == errno.EAGAIN


async def test_one_token_serves_all_calls(files: GcsFileSystem, gcs_service: FakeGcs) -> None:
    before = len(gcs_service.issued)
    await each(put(files, f"/{number}") for number in range(20))
    assert len(gcs_service.issued) == before + 1


async def test_a_key_that_is_no_longer_known(harness: GcsHarness, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    account = json.loads(harness.config()["gcs_service_account_json"])
    with FakeGcs() as another:
        account["token_uri"] = another.service_account["token_uri"]
        files = GcsFileSystem(harness.config(gcs_service_account_json=json.dumps(account)))
        files.patience = QUICK
        await files.open()
        with pytest.raises(PermissionError) as caught:
            await files.stat("/x")
    with pytest.raises(OSError, match="token") as unreachable:
        await files.stat("/x")
    require_transient(unreachable.value)
    harness.require_no_secret(shown(caught.value) + shown(unreachable.value) + caplog.text)
    await files.close()


async def test_without_a_key_the_hosts_own_credentials_are_used(
    harness: GcsHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Application default credentials: here a key file that the environment names."""
    key = tmp_path / "key.json"
    key.write_text(harness.config()["gcs_service_account_json"])
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    location = os.environ["STORAGE_EMULATOR_HOST"]
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    files = GcsFileSystem(harness.config(gcs_service_account_json=None))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", location)
    await files.open()
    await put(files, "/file", b"x")
    assert await get(files, "/file") == b"x"
    await files.close()


async def test_a_missing_bucket_is_not_an_empty_one(harness: GcsHarness) -> None:
    async with harness.opened() as files:
        missing = GcsFileSystem(harness.config(gcs_bucket="no-such-bucket"))
        missing.patience = QUICK
        await missing.open()
        big = missing.write("/x", broken(), size=20 << 20, expected_version=None)
        for call in (entries(missing, "/"), missing.stat("/x"), put(missing, "/x"), put(missing, "/x", b"", ""), big):
            with pytest.raises(OSError, match="bucket does not exist") as caught:
                await call
            assert caught.value.errno == errno.EIO
        await missing.close()
        assert await entries(files, "/") == {}


async def test_an_error_of_the_content_is_not_taken_for_the_services(files: GcsFileSystem) -> None:
    """A file that is to be sent may have gone: that is no conflict."""

    async def content() -> AsyncIterator[bytes]:
        yield bytes(9 << 20)
        raise FileNotFoundError(errno.ENOENT, "the source")

    for size in (10 << 20, 1 << 20):
        with pytest.raises(OSError, match="the source" if size > 9 << 20 else "bytes long"):
            await files.write("/file", content(), size=size, expected_version=ABSENT)
    assert await entries(files, "/") == {}
