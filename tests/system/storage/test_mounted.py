"""All seven backends as mounts of one real sandbox."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from azure.storage.blob import ContainerClient

from conftest import MakeServer
from hiverd import plugins
from hiverd.contracts.filesystem import FileSystem
from hiverd.testing.filesystem_harness import get, put
from support.fake_drive import FakeDrive
from support.fake_external import FakeExternal
from support.fake_gcs import FakeGcs
from support.fake_graph import FakeGraph
from support.object_services import AZURITE_ACCOUNT, AZURITE_KEY
from support.plain import plain_client
from support.sandboxes import Box, local
from support.waiting import until_async

pytestmark = pytest.mark.system

NAME = f"m-{uuid.uuid4().hex}"


@pytest.fixture
def s3(moto_port: int) -> dict[str, Any]:
    endpoint = f"http://127.0.0.1:{moto_port}"
    keys = {"aws_access_key_id": "the-key-id", "aws_secret_access_key": "hush-s3"}
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
    client.create_bucket(Bucket=NAME)
    client.close()
    return {
        "s3_bucket": NAME,
        "s3_endpoint": endpoint,
        "s3_access_key_id": "the-key-id",
        "s3_secret_access_key": "hush-s3",
        "s3_use_path_style": True,
    }


@pytest.fixture
def azure(azurite_port: int) -> Iterator[dict[str, Any]]:
    endpoint = f"http://127.0.0.1:{azurite_port}/{AZURITE_ACCOUNT}"
    with ContainerClient(endpoint, NAME, credential=AZURITE_KEY) as client:
        client.create_container()
        yield {
            "azure_container": NAME,
            "azure_account": AZURITE_ACCOUNT,
            "azure_endpoint": endpoint,
            "azure_account_key": AZURITE_KEY,
        }
        client.delete_container()


@pytest.fixture
def entries(s3: dict[str, Any], azure: dict[str, Any], gcs_service: FakeGcs) -> Iterator[dict[str, dict[str, Any]]]:
    gcs_service.buckets[NAME] = {}
    with FakeExternal() as external:
        yield {
            "s3": s3,
            "azure": azure,
            "gcs": {"gcs_bucket": NAME, "gcs_service_account_json": json.dumps(gcs_service.service_account)},
            "gdrive": {"gdrive_access_token": "token-0", "gdrive_prefix": "agent"},
            "onedrive": {"onedrive_access_token": "token-0", "onedrive_prefix": "agent"},
            "external": {"host": f"http://someone:hush-external@{external.address}"},
        }


async def test_each_is_a_directory_of_one_sandbox(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch, entries: dict[str, dict[str, Any]], gcs_service: FakeGcs
) -> None:
    mounts = [{"backend": name, "mount": f"/{name}", **members} for name, members in entries.items()]
    with FakeDrive() as drive, FakeGraph() as graph:
        environment = {
            "HIVE_GDRIVE_API_URL": drive.url,
            "HIVE_GDRIVE_TOKEN_URL": f"{drive.url}token",
            "HIVE_ONEDRIVE_API_URL": f"{graph.url}/v1.0",
            "HIVE_ONEDRIVE_TOKEN_URL": graph.url,
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{gcs_service.port}",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        plain = [plugins.build(plugins.file_system_class(str(mount["backend"])), mount) for mount in mounts]
        for files in plain:
            await files.open()
            await put(files, "/theirs/in.txt", b"from outside")
        with make_server(environment=environment) as server:
            async with plain_client(base_url=server.url, timeout=60) as client:
                box = await Box.create(client, "all", fs=[local(), *mounts])
                for name in entries:
                    assert await box.out(f"cat /{name}/theirs/in.txt") == "from outside", name
                    await box.out(
                        f"cd /{name}; mkdir ours; printf %s {name} > ours/out; ln -s out ours/link; cat ours/link"
                    )
                for name, files in zip(entries, plain, strict=True):
                    await until_async(lambda f=files, n=name: arrived(f, n), seconds=20, what=f"the upload to {name}")
                    assert (await files.stat("/ours/link")).link_target == "out"
                shown = json.dumps(await box.events()) + server.log_path.read_text()
                assert not [secret for secret in ("hush-", "token-0", AZURITE_KEY, "PRIVATE KEY") if secret in shown]
        for files in plain:
            await files.close()


async def arrived(files: FileSystem, name: str) -> bool:
    try:
        return await get(files, "/ours/out") == name.encode()
    except FileNotFoundError:
        return False
