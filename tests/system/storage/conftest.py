"""The services that stand for those of the world, one of each per test worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support import object_services
from support.fake_gcs import FakeGcs


@pytest.fixture(scope="session")
def moto_port() -> Iterator[int]:
    with object_services.moto() as port:
        yield port


@pytest.fixture(scope="session")
def azurite_port() -> Iterator[int]:
    with object_services.azurite() as port:
        yield port


@pytest.fixture(scope="session")
def gcs_service() -> Iterator[FakeGcs]:
    with FakeGcs() as service:
        yield service
