"""Stores that need no service pass the conformance suite."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from hiver_storage.local import LocalFileSystem
from hiverd.testing.snapshots import SnapshotStoreSuite, StoreHarness
from support.snapshot_stores import (
    BackendMountHarness,
    FileUrlHarness,
    FolderMountHarness,
    LocalHarness,
    UrlHarness,
)


class TestLocal(SnapshotStoreSuite):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> StoreHarness:
        return LocalHarness(tmp_path / "snapshots")


class TestFileUrl(SnapshotStoreSuite):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> StoreHarness:
        return FileUrlHarness(tmp_path / "snapshots")


class TestMemory(SnapshotStoreSuite):
    @pytest.fixture
    def harness(self) -> Iterator[StoreHarness]:
        harness = UrlHarness(f"memory://{secrets.token_hex(8)}", memory=True)
        yield harness
        if harness.files.exists(harness.root):
            harness.files.rm(harness.root, recursive=True)


class TestFolderMount(SnapshotStoreSuite):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> StoreHarness:
        return FolderMountHarness(tmp_path / "mount", tmp_path / "spool")


class TestBackendMount(SnapshotStoreSuite):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> StoreHarness:
        folder = tmp_path / "mount"
        folder.mkdir()
        config = {"mount": "/data", "backend": "local", "origin": str(folder)}
        return BackendMountHarness(lambda: LocalFileSystem(config), tmp_path / "spool")
