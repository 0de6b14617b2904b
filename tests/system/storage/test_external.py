"""The backend `external` against a server of its contract."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest

from hiver_storage.external import ExternalFileSystem
from hiverd.testing.filesystem import Deviation, FileSystemSuite, Harness
from support.fake_external import FakeExternal


class ExternalHarness(Harness):
    deviations: ClassVar[frozenset[Deviation]] = frozenset({"no-prefix", "implied-directories"})
    secrets = ("the-password",)
    many = 150
    big_bytes = 6 << 20

    def __init__(self, service: FakeExternal) -> None:
        self.service = self.faults = service
        service.credentials = "someone:the-password"

    def build(self, prefix: str = "") -> ExternalFileSystem:
        host = f"http://someone:the-password@{self.service.address}/"
        files = ExternalFileSystem({"mount": "/m", "backend": "external", "host": host})
        files.patience.seconds = 1.0
        return files


@pytest.fixture
def service() -> Iterator[FakeExternal]:
    with FakeExternal() as service:
        yield service


@pytest.fixture
def harness(service: FakeExternal) -> ExternalHarness:
    return ExternalHarness(service)


class TestExternal(FileSystemSuite):
    @pytest.fixture
    def harness(self, service: FakeExternal) -> Harness:
        return ExternalHarness(service)


class TestExternalWithoutRanges(FileSystemSuite):
    @pytest.fixture
    def harness(self, service: FakeExternal) -> Harness:
        service.honours_ranges = False
        return ExternalHarness(service)
