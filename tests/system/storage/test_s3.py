"""The backend `s3`: the conformance suite, and what is its own, on moto."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import uuid
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import boto3
import pytest

from hiver_storage.failures import Patience
from hiver_storage.s3 import S3FileSystem
from hiverd.contracts.filesystem import VersionConflictError
from hiverd.testing.filesystem import FileSystemSuite, Harness
from hiverd.testing.filesystem_harness import (
    BrokenSourceError,
    broken,
    entries,
    exists,
    get,
    put,
    require_transient,
    shown,
    tree,
)
from support.faulty_proxy import FaultyProxy
from support.waiting import until_async

QUICK = Patience(first_seconds=0.01)


class S3Harness(Harness):
    # moto has no names with line feeds; S3 itself does.
    deviations = frozenset({"links-beside", "no-newlines"})
    many = 120
    secrets = ("the-secret-access-key", "the-session-token", "AKIATHEACCESSKEYID")

    faults: FaultyProxy

    def __init__(self, bucket: str, proxy: FaultyProxy) -> None:
        self.bucket = bucket
        self.faults = proxy
        self.port = proxy.port

    def build(self, prefix: str = "") -> S3FileSystem:
        files = S3FileSystem(self.config(s3_prefix=prefix))
        files.patience = QUICK
        files.store.page_keys = 50
        return files

    def config(self, **changes: Any) -> dict[str, Any]:
        return {
            "mount": "/data",
            "backend": "s3",
            "s3_bucket": self.bucket,
            "s3_access_key_id": self.secrets[2],
            "s3_secret_access_key": self.secrets[0],
            "s3_session_token": self.secrets[1],
            "s3_endpoint": f"http://127.0.0.1:{self.port}",
            "s3_use_path_style": True,
            **changes,
        }


@pytest.fixture
def client(moto_port: int) -> Iterator[Any]:
    """The SDK, around the proxy."""
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{moto_port}",
        region_name="us-east-1",
        aws_access_key_id="other",
        aws_secret_access_key="other",
    )
    yield client
    client.close()


@pytest.fixture
def harness(moto_port: int, client: Any) -> Iterator[S3Harness]:
    bucket = f"b-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=bucket)
    with FaultyProxy(moto_port) as proxy:
        yield S3Harness(bucket, proxy)


class TestS3(FileSystemSuite):
    @pytest.fixture
    def harness(self, harness: S3Harness) -> S3Harness:
        return harness


@pytest.fixture
async def files(harness: S3Harness) -> AsyncIterator[S3FileSystem]:
    files = harness.build()
    await files.open()
    yield files
    await files.close()


def keys(client: Any, harness: S3Harness) -> set[str]:
    return {found["Key"] for found in client.list_objects_v2(Bucket=harness.bucket).get("Contents", ())}


async def test_links_and_markers_that_other_programs_made(files: S3FileSystem, harness: S3Harness, client: Any) -> None:
    """A side file is a link; one that is too long for that, or lies beside a file, is not shown as one."""
    for key, body in {
        "dir/": b"",
        "dir/link.symlink": b"../target",
        "dir/long.symlink": b"x" * 5000,
        "dir/file": b"file",
        "dir/file.symlink": b"hidden",
        "dir//odd": b"",
        "dir/./dot": b"",
        "dir/file/below": b"hidden too",
    }.items():
        client.put_object(Bucket=harness.bucket, Key=key, Body=body)
    assert await tree(files) == {
        "/dir": None,
        "/dir/link": "../target",
        "/dir/long.symlink": b"x" * 5000,
        "/dir/file": b"file",
    }
    assert (await files.stat("/dir/link")).link_target == "../target"
    await files.delete("/dir/file")
    assert {"dir/link.symlink", "dir/file/below"} <= keys(client, harness)
    assert "dir/file.symlink" not in keys(client, harness)


async def test_a_file_with_the_name_of_a_side_file(files: S3FileSystem) -> None:
    """It stays what it is, and is no link."""
    await put(files, "/notes.symlink", b"text")
    assert await tree(files) == {"/notes.symlink": b"text"}
    assert not await exists(files, "/notes")
    await files.symlink("/other", "target")
    assert not await exists(files, "/other.symlink")
    await files.move("/notes.symlink", "/d/moved.symlink")
    assert await tree(files) == {"/d": None, "/d/moved.symlink": b"text", "/other": "target"}


async def test_bytes_that_are_no_text_in_names_and_targets(files: S3FileSystem) -> None:
    await put(files, "/a\udcff", b"x")
    await files.symlink("/link", "b\udcfe")
    assert await tree(files) == {"/a\udcff": b"x", "/link": "b\udcfe"}


async def test_an_upload_that_fails_leaves_nothing(files: S3FileSystem, harness: S3Harness, client: Any) -> None:
    with pytest.raises(BrokenSourceError):
        await files.write("/big", broken(*[bytes(1 << 20)] * 18), size=20 << 20, expected_version=None)
    assert "Uploads" not in client.list_multipart_uploads(Bucket=harness.bucket)
    assert keys(client, harness) == set()


async def test_a_conflict_is_known_before_a_large_file_is_sent(files: S3FileSystem, harness: S3Harness) -> None:
    await put(files, "/big", b"small")
    before = harness.faults.requests
    with pytest.raises(VersionConflictError):
        await files.write("/big", broken(), size=20 << 20, expected_version="")
    assert harness.faults.requests - before == 1


async def test_no_more_of_a_large_file_is_held_than_a_part(files: S3FileSystem) -> None:
    """Measured where the content comes from: what was given away is gone when the next part is asked for."""
    block = 1 << 20
    alive: list[weakref.ref[Block]] = []
    most = 0

    async def content() -> AsyncIterator[bytes]:
        nonlocal most
        for _ in range(40):
            piece = Block(block)
            alive.append(weakref.ref(piece))
            yield piece
            del piece
            most = max(most, sum(one() is not None for one in alive))

    await files.write("/big", content(), size=40 * block, expected_version=None)
    assert most <= 3


class Block(bytearray):
    """Bytes that can be watched."""


async def test_requests_that_each_call_takes(files: S3FileSystem, harness: S3Harness) -> None:
    await put(files, "/d/file", b"x", "")

    async def requests(call: Any) -> int:
        before = harness.faults.requests
        await call
        return harness.faults.requests - before

    assert await requests(files.stat("/d/file")) == 1
    assert await requests(get(files, "/d/file")) == 1
    assert await requests(entries(files, "/d")) == 1
    assert await requests(put(files, "/d/new", b"x", "")) == 1


async def test_a_missing_bucket_is_not_an_empty_one(harness: S3Harness) -> None:
    harness.bucket = "no-such-bucket"
    async with harness.opened() as files:
        for call in (entries(files, "/"), files.stat("/x"), put(files, "/x"), put(files, "/x", b"", "")):
            with pytest.raises(OSError, match="bucket does not exist") as caught:
                await call
            assert caught.value.errno == errno.EIO


async def test_a_service_that_says_nothing(harness: S3Harness) -> None:
    files = harness.build()
    files.patience = Patience(attempts=2, first_seconds=0.01, request_seconds=0.3)
    await files.open()
    harness.faults.fail("stall", 1)
    assert await entries(files, "/") == {}
    harness.faults.fail("stall", 2)
    with pytest.raises(TimeoutError) as caught:
        await files.stat("/x")
    assert caught.value.errno == errno.ETIMEDOUT
    await files.close()


async def test_a_service_that_is_not_there(harness: S3Harness, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with socket.create_server(("127.0.0.1", 0)) as held:
        harness.port = held.getsockname()[1]
    async with harness.opened() as files:
        with pytest.raises(OSError, match="connection") as caught:
            await files.stat("/x")
    require_transient(caught.value)
    harness.require_no_secret(shown(caught.value) + caplog.text)


async def test_a_tree_that_cannot_be_moved_stays(files: S3FileSystem, harness: S3Harness) -> None:
    """Nothing is removed before everything is copied."""
    for number in range(5):
        await put(files, f"/from/{number}", b"x")
    moving = asyncio.create_task(files.move("/from", "/to"))
    before = harness.faults.requests
    await until_async(lambda: _is(harness.faults.requests > before + 4), seconds=10, what="copying has begun")
    harness.faults.fail("503", 100)
    with contextlib.suppress(OSError):
        await moving
    harness.faults.fail("503", 0)
    whole = {f"/{number}" for number in range(5)}
    kept = {path.removeprefix("/from") for path in await tree(files) if path.startswith("/from/")}
    copied = {path.removeprefix("/to") for path in await tree(files) if path.startswith("/to/")}
    assert whole in (kept, copied)


async def _is(answer: bool) -> bool:
    return answer
