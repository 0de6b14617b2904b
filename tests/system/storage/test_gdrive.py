"""The backend `gdrive` against a Drive of our own that speaks Drive's API."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hiver_storage.gdrive import GDriveFileSystem
from hiverd.testing.filesystem import FileSystemSuite, Harness
from support.fake_drive import FakeDrive


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
