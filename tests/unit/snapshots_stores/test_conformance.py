"""Stores that need no service pass the conformance suite."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from hiverd.testing.snapshots import SnapshotStoreSuite, StoreHarness
from support.snapshot_stores import FileUrlHarness, LocalHarness, UrlHarness


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
