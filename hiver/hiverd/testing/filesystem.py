"""The conformance suite of file-system plug-ins.

    class TestMine(FileSystemSuite):
        @pytest.fixture
        def harness(self):
            return MyHarness(...)       # a `Harness` whose `build` makes the plug-in, on a store that is empty

The tests are real: they need the service, or something that speaks as it does. They run with pytest-asyncio in `auto`
mode. Each test gets a harness of its own, so tests never see each other's objects.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from hiverd.contracts.filesystem import FileSystem

from .filesystem_changing import ChangingSuite
from .filesystem_faults import FaultSuite
from .filesystem_harness import Deviation, FailureKind, Faults, Harness
from .filesystem_links import LinkSuite
from .filesystem_listing import ListingSuite
from .filesystem_reading import ReadingSuite
from .filesystem_versions import VersionSuite
from .filesystem_writing import WritingSuite


class FileSystemSuite(ReadingSuite, ListingSuite, WritingSuite, VersionSuite, LinkSuite, ChangingSuite, FaultSuite):
    """All of it."""

    @pytest.fixture
    def harness(self) -> Harness:
        """To be overridden."""
        raise NotImplementedError

    @pytest.fixture
    async def files(self, harness: Harness) -> AsyncIterator[FileSystem]:
        """An opened plug-in on an empty store; closed at the end."""
        async with harness.opened() as files:
            yield files


__all__ = ["Deviation", "FailureKind", "Faults", "FileSystemSuite", "Harness"]
