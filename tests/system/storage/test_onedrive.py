"""The backend `onedrive` against a Graph of our own that speaks Graph's API."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hiver_storage.onedrive import OneDriveFileSystem
from hiverd.testing.filesystem import FileSystemSuite, Harness
from support.fake_graph import FakeGraph


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
