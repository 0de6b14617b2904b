"""The backend `gcs`: the conformance suite, and what is its own, on a service of our own making."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from hiver_storage.failures import Patience
from hiver_storage.gcs import GcsFileSystem
from hiverd.testing.filesystem import FileSystemSuite, Harness
from support.fake_gcs import FakeGcs
from support.faulty_proxy import FaultyProxy

QUICK = Patience(first_seconds=0.01)


class GcsFaults(FaultyProxy):
    def __init__(self, service: FakeGcs) -> None:
        super().__init__(service.port, refusal=401)
        self._service = service

    def expire_token(self) -> bool:
        self._service.tokens.clear()
        return True


class GcsHarness(Harness):
    many = 120

    def __init__(self, bucket: str, service: FakeGcs, proxy: FaultyProxy) -> None:
        self.bucket = bucket
        self.faults = proxy
        self._service = service
        self._account = service.service_account

    @property
    def secrets(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self._account["private_key"].splitlines()[1], *self._service.issued)

    def build(self, prefix: str = "") -> GcsFileSystem:
        files = GcsFileSystem(self.config(gcs_prefix=prefix))
        files.patience = QUICK
        files.store.page_keys = 50
        return files

    def config(self, **changes: Any) -> dict[str, Any]:
        return {
            "mount": "/data",
            "backend": "gcs",
            "gcs_bucket": self.bucket,
            "gcs_service_account_json": json.dumps(self._account),
            **changes,
        }


@pytest.fixture
def harness(gcs_service: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsHarness]:
    bucket = f"b-{uuid.uuid4().hex}"
    gcs_service.buckets[bucket] = {}
    with GcsFaults(gcs_service) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{proxy.port}")
        yield GcsHarness(bucket, gcs_service, proxy)
    del gcs_service.buckets[bucket]


class TestGcs(FileSystemSuite):
    @pytest.fixture
    def harness(self, harness: GcsHarness) -> GcsHarness:
        return harness
