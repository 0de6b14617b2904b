"""The backend `azure`: the conformance suite, and what is its own, on azurite."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from azure.storage.blob import AccountSasPermissions, ContainerClient, ResourceTypes, generate_account_sas

from hiver_storage.azure import AzureFileSystem
from hiver_storage.failures import Patience
from hiverd.testing.filesystem import FileSystemSuite, Harness
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
