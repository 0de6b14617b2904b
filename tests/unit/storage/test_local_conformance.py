"""The conformance suite on the backend `local`."""

from __future__ import annotations

from pathlib import Path

import pytest

from hiver_storage.local import LocalFileSystem
from hiverd.testing.filesystem import FileSystemSuite, Harness


class LocalHarness(Harness):
    big_bytes = 4 << 20

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def build(self, prefix: str = "") -> LocalFileSystem:
        origin = self._folder / prefix
        origin.mkdir(parents=True, exist_ok=True)
        return LocalFileSystem({"mount": "/data", "backend": "local", "origin": str(origin)})


class TestLocal(FileSystemSuite):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> LocalHarness:
        return LocalHarness(tmp_path)
