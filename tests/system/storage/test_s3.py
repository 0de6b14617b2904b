"""The backend `s3`: the conformance suite, and what is its own, on moto."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import boto3
import pytest

from hiver_storage.failures import Patience
from hiver_storage.s3 import S3FileSystem
from hiverd.testing.filesystem import FileSystemSuite, Harness
from support.faulty_proxy import FaultyProxy

QUICK = Patience(first_seconds=0.01)


class S3Harness(Harness):
    # moto has no names with line feeds; S3 itself does.
    deviations = frozenset({"links-beside", "no-newlines"})
    many = 120
    secrets = ("the-secret-access-key", "the-session-token", "AKIATHEACCESSKEYID")

    def __init__(self, bucket: str, proxy: FaultyProxy) -> None:
        self.bucket = bucket
        self.faults = proxy
        self.port = proxy.port

    def build(self, prefix: str = "") -> S3FileSystem:
        files = S3FileSystem(self.config(s3_prefix=prefix))
        files.patience = QUICK
        files.store.page_keys = 50
        return files

    def config(self, **changes: Any) -> dict[str, Any]:
        return {
            "mount": "/data",
            "backend": "s3",
            "s3_bucket": self.bucket,
            "s3_access_key_id": self.secrets[2],
            "s3_secret_access_key": self.secrets[0],
            "s3_session_token": self.secrets[1],
            "s3_endpoint": f"http://127.0.0.1:{self.port}",
            "s3_use_path_style": True,
            **changes,
        }


@pytest.fixture
def client(moto_port: int) -> Iterator[Any]:
    """The SDK, around the proxy."""
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{moto_port}",
        region_name="us-east-1",
        aws_access_key_id="other",
        aws_secret_access_key="other",
    )
    yield client
    client.close()


@pytest.fixture
def harness(moto_port: int, client: Any) -> Iterator[S3Harness]:
    bucket = f"b-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=bucket)
    with FaultyProxy(moto_port) as proxy:
        yield S3Harness(bucket, proxy)


class TestS3(FileSystemSuite):
    @pytest.fixture
    def harness(self, harness: S3Harness) -> S3Harness:
        return harness
