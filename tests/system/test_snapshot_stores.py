"""Snapshot stores on real places: object stores on loopback, full disks, mounts of remote backends."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import msgspec
import pytest

from contract.scenarios.registry import load
from hiver_snapshots.remote import RemoteStore
from hiver_storage.s3 import S3FileSystem
from hiverd.contracts.errors import BackendError, HiverError, UnavailableError
from hiverd.sandboxes.mounts import MountPlanner
from hiverd.sandboxes.snapshot_stores import SnapshotStores, open_store
from hiverd.settings import SnapshotsSettings
from hiverd.testing.snapshot_harness import FIRST, BrokenSourceError, get, listed, noise, pieces, put
from hiverd.testing.snapshots import SnapshotStoreSuite, StoreHarness
from hiverd.wire.config import decode_config
from support import object_services
from support.clients import Driver, version_tuple
from support.fake_gcs import FakeGcs
from support.plain import plain_client
from support.server import Server
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
def client(moto_port: int) -> Iterator[Any]:
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{moto_port}",
        aws_access_key_id=KEY_ID,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
    )
    yield client
    client.close()


@pytest.fixture
def bucket(client: Any) -> str:
    name = f"b{uuid.uuid4().hex}"
    client.create_bucket(Bucket=name)
    return name


def s3_mount(bucket: str, port: int) -> dict[str, Any]:
    return {
        "mount": "/data",
        "backend": "s3",
        "s3_bucket": bucket,
        "s3_prefix": "team",
        "s3_access_key_id": KEY_ID,
        "s3_secret_access_key": SECRET,
        "s3_endpoint": f"http://127.0.0.1:{port}",
        "s3_use_path_style": True,
    }


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
        config = s3_mount(bucket, moto_port)
        return BackendMountHarness(lambda: S3FileSystem(config), tmp_path / "spool")


async def test_an_internal_mount_of_a_configuration(client: Any, bucket: str, moto_port: int, tmp_path: Path) -> None:
    config = decode_config(msgspec.json.encode({"fs": [{**s3_mount(bucket, moto_port), "internal": True}]}))
    settings = SnapshotsSettings(path=tmp_path / "snapshots")
    default = await open_store(settings, FIRST)
    stores = SnapshotStores(default, settings, MountPlanner([], environ={}), tmp_path / "spool")
    try:
        async with stores.chosen(config, "/data", None) as store:
            await put(store, "demo", b"\x1f\x8b" + noise(1000))
            found = client.list_objects_v2(Bucket=bucket)["Contents"]
            assert [entry["Key"] for entry in found] == ["team/snapshot-demo.tar.gz"], "the service has it already"
        async with stores.chosen(config, "/data", None) as store, stores.fetched(store, "demo") as fetched:
            assert fetched.file.read() == b"\x1f\x8b" + noise(1000)
        assert await listed(default) == []
    finally:
        stores.close()
        await default.close()


async def test_an_upload_that_fails_leaves_no_parts_behind(
    credentials: None, client: Any, bucket: str, moto_port: int
) -> None:
    store = RemoteStore(options_for(url=f"s3://{bucket}/x", endpoint_url=f"http://127.0.0.1:{moto_port}"))
    begun: list[Any] = []

    async def content() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield noise(1 << 20)
        begun.extend(client.list_multipart_uploads(Bucket=bucket)["Uploads"])
        raise BrokenSourceError

    try:
        with pytest.raises(BrokenSourceError):
            await store.put("demo", content())
    finally:
        await store.close()
    assert begun, "it was sent in parts"
    assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket)


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


async def run(http: httpx.AsyncClient, key: str, command: str, snapshot: dict[str, Any], **config: Any) -> str:
    """What the command says in a sandbox that is there for it alone."""
    body = {"ttl": 0, "snapshot": snapshot, **config}
    ref = (await http.post(f"/v1/sandboxes/{key}", json=body)).raise_for_status().json()
    api = f"/sandbox/{ref['id']}/v1/{key}"
    try:
        answer = (await http.post(f"{api}/exec", json={"command": command})).raise_for_status().json()
    finally:
        (await http.delete(api)).raise_for_status()
    return str(answer["stdout"])


@needs_root
@pytest.mark.parametrize("where", ["store", "mount"])
async def test_sandboxes_come_back_from_a_service(
    make_server: Callable[..., Server], client: Any, bucket: str, moto_port: int, where: str
) -> None:
    config = ""
    if where == "store":
        options = f'options = {{ endpoint_url = "http://127.0.0.1:{moto_port}" }}'
        config = f'[snapshots]\nstore = "remote"\nurl = "s3://{bucket}/team"\n{options}\n'
    environment = {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    server = make_server(config=config, environment=environment)
    server.start()
    files = {"key": "state", "write_on_shutdown": True, "include": ["/root/**"]}
    mounts: dict[str, Any] = {}
    if where == "mount":
        files["mount"] = "/data"
        mounts = {"fs": [{**s3_mount(bucket, moto_port), "internal": True}]}
    async with plain_client(base_url=server.url, timeout=120) as http:
        await run(http, "one", "mkdir -p /root/d; echo kept > /root/d/f", {"files": files}, **mounts)
        names = [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket).get("Contents", [])]
        assert names, server.log_tail()
        assert (names[0].startswith("team/snapshot-state.tar")) == (where == "mount")
        assert await run(http, "two", "cat /root/d/f", {"files": files}, **mounts) == "kept\n"
        if where == "store":
            assert (await http.post("/v1/snapshots/state/fork", json={"to": "other"})).is_success
            assert (await http.delete("/v1/snapshots/state")).status_code == 204
            assert await run(http, "three", "cat /root/d/f", {"files": {**files, "key": "other"}}) == "kept\n"
    assert server.stop() == 0
    for secret in (KEY_ID, SECRET):
        assert secret not in server.log_path.read_text()


@pytest.mark.parametrize("where", ["local", "remote"])
def test_published_clients_of_both_forms_come_back(
    make_server: Callable[..., Server], client: Any, bucket: str, moto_port: int, where: str
) -> None:
    config = ""
    if where == "remote":
        options = f'options = {{ endpoint_url = "http://127.0.0.1:{moto_port}" }}'
        config = f'[snapshots]\nstore = "remote"\nurl = "s3://{bucket}/clients"\n{options}\n'
    environment = {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    with make_server(config=config, environment=environment) as server:
        for version in ("0.1.15", "0.1.18", "0.1.45"):
            ours = [each for each in load().values() if each.name.startswith("snapshots.")]
            covered = [each for each in ours if each.covers(version_tuple(version))]
            assert covered
            driver = Driver(version, server.url)
            try:
                for scenario in covered:
                    driver.run(scenario.name, seconds=scenario.seconds)
            finally:
                driver.close()
    stored = client.list_objects_v2(Bucket=bucket).get("Contents", [])
    assert bool(stored) == (where == "remote")
