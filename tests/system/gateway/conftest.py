"""A gateway in front of a network namespace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.gateway import Front, RecordedEvents, Target


@pytest.fixture(scope="module")
def shared_front(namespace: str) -> Iterator[Front]:
    with Front(Target(namespace), refused_patience_seconds=1.0) as front:
        yield front


@pytest.fixture
def front(shared_front: Front) -> Front:
    """The module's gateway with no event and no connection of an earlier test."""
    shared_front.target.events = RecordedEvents()
    shared_front.call(shared_front.gateway.forget, "sandbox-1")
    return shared_front
