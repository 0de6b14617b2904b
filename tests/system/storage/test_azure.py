"""The backend `azure`: the conformance suite, and what is its own, on azurite."""

from __future__ import annotations

import errno
import gzip
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from azure.storage.blob import (
    AccountSasPermissions,
    ContainerClient,
    ContentSettings,
    ResourceTypes,
    generate_account_sas,
)

from hiver_storage.azure import AzureFileSystem
from hiver_storage.failures import Patience
from hiverd.testing.filesystem import FileSystemSuite, Harness
from hiverd.testing.filesystem_harness import entries, get, put, shown, tree
from support.faulty_proxy import FaultyProxy
from support.object_services import AZURITE_ACCOUNT, AZURITE_KEY

QUICK = Patience(first_seconds=0.01)


def sas_token(**changes: Any) -> str:
    return generate_account_sas(
        AZURITE_ACCOUNT,
        AZURITE_KEY,
        ResourceTypes(container=True, object=True),
        AccountSasPermissions(read=True, write=True, delete=True, list=True, add=True, create=True),
        datetime.now(UTC) + timedelta(hours=1),
        **changes,
    )


class AzureHarness(Harness):
    many = 120

    def __init__(self, container: str, proxy: FaultyProxy, credentials: dict[str, str]) -> None:
        self.container = container
        self.faults = proxy
        self.endpoint = f"http://127.0.0.1:{proxy.port}/{AZURITE_ACCOUNT}"
        self.credentials = credentials

    @property
    def secrets(self) -> tuple[str, ...]:  # type: ignore[override]
        token = self.credentials.get("azure_sas_token", "")
        return (AZURITE_KEY, *(part for part in token.split("&") if part.startswith("sig=")))

    def build(self, prefix: str = "") -> AzureFileSystem:
        files = AzureFileSystem(self.config(azure_prefix=prefix))
        files.patience = QUICK
        files.store.page_keys = 50
        return files

    def config(self, **changes: Any) -> dict[str, Any]:
        return {
            "mount": "/data",
            "backend": "azure",
            "azure_container": self.container,
            "azure_endpoint": self.endpoint,
            **self.credentials,
            **changes,
        }


@pytest.fixture
def client(azurite_port: int) -> Iterator[ContainerClient]:
    """A container of its own, around the proxy."""
    url = f"http://127.0.0.1:{azurite_port}/{AZURITE_ACCOUNT}"
    with ContainerClient(url, f"c-{uuid.uuid4().hex}", credential=AZURITE_KEY) as client:
        client.create_container()
        yield client
        client.delete_container()


@pytest.fixture
def proxy(azurite_port: int) -> Iterator[FaultyProxy]:
    with FaultyProxy(azurite_port) as proxy:
        yield proxy


@pytest.fixture
def harness(client: ContainerClient, proxy: FaultyProxy) -> AzureHarness:
    return AzureHarness(client.container_name, proxy, {"azure_sas_token": f"?{sas_token()}"})


class TestAzure(FileSystemSuite):
    @pytest.fixture
    def harness(self, harness: AzureHarness) -> AzureHarness:
        return harness


@pytest.mark.parametrize("way", ["key", "key without account", "connection string", "connection string with SAS"])
async def test_ways_to_give_a_credential(harness: AzureHarness, way: str) -> None:
    """A connection string wins over what else is there."""
    endpoint = f"BlobEndpoint={harness.endpoint}"
    harness.credentials = {
        "key": {"azure_account": AZURITE_ACCOUNT, "azure_account_key": AZURITE_KEY},
        "key without account": {"azure_account_key": AZURITE_KEY},
        "connection string": {
            "azure_connection_string": f"AccountName={AZURITE_ACCOUNT};AccountKey={AZURITE_KEY};{endpoint};",
            "azure_account_key": "d3Jvbmc=",
        },
        "connection string with SAS": {
            "azure_connection_string": f"{endpoint};SharedAccessSignature={sas_token()}",
            "azure_endpoint": "http://127.0.0.1:9",
        },
    }[way]
    async with harness.opened() as files:
        await put(files, "/d/file", b"x")
        await files.move("/d/file", "/moved")
        assert await tree(files) == {"/d": None, "/moved": b"x"}


async def test_a_signature_that_is_not_accepted(harness: AzureHarness, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    harness.credentials = {"azure_sas_token": sas_token().replace("sig=", "sig=AAAA")}
    async with harness.opened() as files:
        for call in (files.stat("/x"), entries(files, "/"), put(files, "/x")):
            with pytest.raises(PermissionError) as caught:
                await call
            harness.require_no_secret(shown(caught.value) + caplog.text)
            assert "sig=" not in shown(caught.value)


async def test_directories_that_other_programs_made(harness: AzureHarness, client: ContainerClient) -> None:
    client.upload_blob("marked", b"", metadata={"hdi_isfolder": "true"})
    client.upload_blob("marked/file", b"x")
    async with harness.opened() as files:
        assert await tree(files) == {"/marked": None, "/marked/file": b"x"}
        assert (await files.stat("/marked")).is_dir


async def test_what_is_stored_packed_is_read_as_it_is(harness: AzureHarness, client: ContainerClient) -> None:
    packed = gzip.compress(b"text" * 1000)
    client.upload_blob("file", packed, content_settings=ContentSettings(content_encoding="gzip"))
    async with harness.opened() as files:
        assert await get(files, "/file") == packed
        assert await get(files, "/file", 2, 5) == packed[2:7]


async def test_names_that_the_service_would_change(harness: AzureHarness, client: ContainerClient) -> None:
    """A backslash would be a slash, and lead out of the prefix."""
    client.upload_blob("secret", b"theirs")
    async with harness.opened("team") as files:
        for path in ("/..\\secret", "/a\\..\\..\\secret"):
            await put(files, path, b"ours")
        await put(files, "/dots..", b"x")
        assert await tree(files) == {"/..\\secret": b"ours", "/a\\..\\..\\secret": b"ours", "/dots..": b"x"}
    assert client.download_blob("secret").readall() == b"theirs"
    assert {blob.name.split("/")[0] for blob in client.list_blobs()} == {"secret", "team"}


async def test_a_file_that_changes_while_it_is_read(harness: AzureHarness) -> None:
    async with harness.opened() as files:
        await put(files, "/big", b"a" * (9 << 20))
        reading = files.read("/big", 0, None)
        await anext(reading)
        await put(files, "/big", b"b" * (9 << 20))
        with pytest.raises(OSError, match="changed while it was read") as caught:
            async for _ in reading:
                pass
        assert caught.value.errno == errno.EAGAIN


async def test_a_missing_container_is_not_an_empty_one(harness: AzureHarness) -> None:
    harness.container = "no-such-container"
    async with harness.opened() as files:
        for call in (entries(files, "/"), files.stat("/x"), put(files, "/x"), put(files, "/x", b"", "")):
            with pytest.raises(OSError, match="does not exist") as caught:
                await call
            assert caught.value.errno == errno.EIO
