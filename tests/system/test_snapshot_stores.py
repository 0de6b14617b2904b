"""Snapshot stores on real places: object stores on loopback, full disks, mounts of remote backends."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from hiver_snapshots.remote import RemoteStore
from hiver_storage.s3 import S3FileSystem
from hiverd.contracts.errors import BackendError, HiverError, UnavailableError
from hiverd.testing.snapshot_harness import get, listed, noise, pieces, put
from hiverd.testing.snapshots import SnapshotStoreSuite, StoreHarness
from support import object_services
from support.fake_gcs import FakeGcs
from support.snapshot_stores import (
    BackendMountHarness,
    FileUrlHarness,
    LocalHarness,
    UrlHarness,
    options_for,
)

KEY_ID, SECRET = "AKIATHEACCESSKEYID", "the-secret-access-key"


@pytest.fixture(scope="module")
def moto_port() -> Iterator[int]:
    with object_services.moto() as port:
        yield port


@pytest.fixture(scope="module")
def gcs_service() -> Iterator[FakeGcs]:
    with FakeGcs() as service:
        yield service


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the libraries look for them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)


@pytest.fixture
def bucket(moto_port: int) -> str:
    name = f"b{uuid.uuid4().hex}"
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{moto_port}",
        aws_access_key_id=KEY_ID,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=name)
    client.close()
    return name


class TestS3(SnapshotStoreSuite):
    @pytest.fixture
    def harness(self, credentials: None, moto_port: int, bucket: str) -> StoreHarness:
        return UrlHarness(f"s3://{bucket}/team/snapshots", endpoint_url=f"http://127.0.0.1:{moto_port}")


class TestGcs(SnapshotStoreSuite):
    @pytest.fixture
    def harness(self, gcs_service: FakeGcs) -> StoreHarness:
        name = f"b{uuid.uuid4().hex}"
        gcs_service.buckets[name] = {}
        return UrlHarness(
            f"gs://{name}/team/snapshots",
            endpoint_url=f"http://127.0.0.1:{gcs_service.port}",
            token=gcs_service.service_account,
        )


class TestS3Mount(SnapshotStoreSuite):
    @pytest.fixture
    def harness(self, moto_port: int, bucket: str, tmp_path: Path) -> StoreHarness:
        config = {
            "mount": "/data",
            "backend": "s3",
            "s3_bucket": bucket,
            "s3_prefix": "team",
            "s3_access_key_id": KEY_ID,
            "s3_secret_access_key": SECRET,
            "s3_endpoint": f"http://127.0.0.1:{moto_port}",
            "s3_use_path_style": True,
        }
        return BackendMountHarness(lambda: S3FileSystem(config), tmp_path / "spool")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")


@needs_root
class TestSmallDisk(SnapshotStoreSuite):
    @pytest.fixture
    def harness(self, small_disk: Path) -> StoreHarness:
        harness = LocalHarness(small_disk / "snapshots")
        harness.can_fill = True
        return harness


@needs_root
async def test_a_full_disk_behind_a_url(small_disk: Path) -> None:
    harness = FileUrlHarness(small_disk / "snapshots")
    async with harness.started() as store:
        await put(store, "demo", b"old")
        with pytest.raises(UnavailableError, match="full"):
            await store.put("demo", pieces(*[noise(1 << 20)] * 80))
        assert await get(store, "demo") == b"old"
        assert await harness.leftovers() == []


@pytest.mark.parametrize("wrong", ["bucket", "address"])
async def test_a_service_that_refuses_is_told_without_secrets(
    credentials: None, moto_port: int, bucket: str, wrong: str
) -> None:
    port = 9 if wrong == "address" else moto_port
    url = f"s3://{'none-' if wrong == 'bucket' else ''}{bucket}/x"
    more: dict[str, Any] = {"config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 1}}
    store = RemoteStore(options_for(url=url, endpoint_url=f"http://127.0.0.1:{port}", **more))
    try:
        with pytest.raises(BackendError if wrong == "bucket" else UnavailableError) as failed:
            await put(store, "demo", b"data")
        assert url in failed.value.message
        for secret in (KEY_ID, SECRET):
            assert secret not in failed.value.message
        assert failed.value.__cause__ is None, "a library's own text can hold what must not be shown"
        if wrong == "address":
            with pytest.raises(HiverError):
                await listed(store)
    finally:
        await store.close()
