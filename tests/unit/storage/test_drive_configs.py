"""What the configurations of gdrive, onedrive and external must hold. No error says what a credential is."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from hiver_storage.external import ExternalFileSystem
from hiver_storage.gdrive import GDriveFileSystem
from hiver_storage.onedrive import OneDriveFileSystem
from hiverd.contracts.errors import InvalidError
from hiverd.contracts.filesystem import FileSystem
from hiverd.testing.filesystem_harness import shown

GOOD: list[tuple[type[FileSystem], dict[str, str]]] = [
    (GDriveFileSystem, {"gdrive_access_token": "the-secret"}),
    (GDriveFileSystem, {"gdrive_refresh_token": "the-secret", "gdrive_client_id": "c", "gdrive_prefix": "/a/b/"}),
    (OneDriveFileSystem, {"onedrive_access_token": "the-secret", "onedrive_refresh_token": "", "onedrive_prefix": "a"}),
    (OneDriveFileSystem, {"onedrive_refresh_token": "the-secret", "onedrive_client_id": "c"}),
    (ExternalFileSystem, {"host": "https://user:the-secret@host.example:8443/base/"}),
]
ACCOUNT = json.dumps({"type": "service_account", "client_email": "a@b", "private_key": "the-secret"})
BAD: list[tuple[type[FileSystem], dict[str, object], str]] = [
    (GDriveFileSystem, {}, "gdrive_access_token"),
    (GDriveFileSystem, {"gdrive_access_token": 5}, "gdrive_access_token"),
    (GDriveFileSystem, {"gdrive_access_token": "the-secret\n"}, "gdrive_access_token"),
    (GDriveFileSystem, {"gdrive_refresh_token": "the-secret"}, "gdrive_client_id"),
    (GDriveFileSystem, {"gdrive_service_account_json": "the-secret"}, "gdrive_service_account_json"),
    (GDriveFileSystem, {"gdrive_service_account_json": '["the-secret"]'}, "gdrive_service_account_json"),
    (GDriveFileSystem, {"gdrive_service_account_json": ACCOUNT}, "gdrive_service_account_json"),
    (GDriveFileSystem, {"gdrive_access_token": "the-secret", "gdrive_folder_id": "a'b"}, "gdrive_folder_id"),
    (GDriveFileSystem, {"gdrive_access_token": "the-secret", "gdrive_prefix": "../x"}, "gdrive_prefix"),
    (OneDriveFileSystem, {}, "onedrive_access_token"),
    (OneDriveFileSystem, {"onedrive_access_token": "the-secret\u00e9"}, "onedrive_access_token"),
    (OneDriveFileSystem, {"onedrive_refresh_token": "the-secret"}, "onedrive_client_id"),
    (OneDriveFileSystem, {"onedrive_access_token": "the-secret", "onedrive_tenant": "a/b"}, "onedrive_tenant"),
    (OneDriveFileSystem, {"onedrive_access_token": "the-secret", "onedrive_drive_id": "../me"}, "onedrive_drive_id"),
    (OneDriveFileSystem, {"onedrive_access_token": "the-secret", "onedrive_prefix": "a//b"}, "onedrive_prefix"),
    (ExternalFileSystem, {}, "host"),
    (ExternalFileSystem, {"host": "ftp://user:the-secret@h"}, "host"),
    (ExternalFileSystem, {"host": "https://user:the-secret@h:port"}, "host"),
    (ExternalFileSystem, {"host": "https://user:the-secret@"}, "host"),
    (ExternalFileSystem, {"host": "https://h/?the-secret"}, "host"),
]


@pytest.mark.parametrize(("cls", "members"), GOOD)
async def test_good_ones(cls: type[FileSystem], members: Mapping[str, str]) -> None:
    files = cls({"mount": "/m", "backend": cls.backend, **members})
    assert "the-secret" not in repr(files) + str(files)
    await files.open()
    await files.close()


@pytest.mark.parametrize(("cls", "members", "field"), BAD)
def test_bad_ones_are_named(cls: type[FileSystem], members: Mapping[str, object], field: str) -> None:
    with pytest.raises(InvalidError) as caught:
        cls({"mount": "/m", "backend": cls.backend, **members})
    assert caught.value.field == field
    assert field in caught.value.message
    # The traceback repeats lines of this file, but not the members.
    assert "the-secret" not in shown(caught.value)
