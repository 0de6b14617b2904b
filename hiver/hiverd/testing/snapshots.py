"""The conformance suite of snapshot stores.

    class TestMine(SnapshotStoreSuite):
        @pytest.fixture
        def harness(self):
            return MyHarness(...)       # a `StoreHarness` whose `build` makes the store, on a place that is empty

The tests are real: they need the service, or something that speaks as it does. They run with pytest-asyncio in `auto`
mode. Each test gets a harness of its own, so tests never see each other's snapshots.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from hiverd.contracts.snapshot import SnapshotStore

from .snapshot_faults import SnapshotFaultSuite
from .snapshot_harness import StoreHarness
from .snapshot_versions import SnapshotVersionSuite
from .snapshot_whole import SnapshotWholeSuite


class SnapshotStoreSuite(SnapshotWholeSuite, SnapshotVersionSuite, SnapshotFaultSuite):
    """All of it."""

    @pytest.fixture
    def harness(self) -> StoreHarness:
        """To be overridden."""
        raise NotImplementedError

    @pytest.fixture
    async def store(self, harness: StoreHarness) -> AsyncIterator[SnapshotStore]:
        """A store on an empty place; closed at the end."""
        async with harness.started() as store:
            yield store


__all__ = ["SnapshotStoreSuite", "StoreHarness"]
