"""The conformance suite of isolation plug-ins.

    class TestMine(IsolationSuite):
        @pytest.fixture
        def harness(self, tmp_path):
            return MyHarness(tmp_path)      # a `Harness` whose `build` makes the plug-in

The tests are real: they need what the plug-in needs. They run with pytest-asyncio in `auto` mode.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hiverd.contracts.isolation import Isolation, Workload

from .isolation_exec import ExecSuite
from .isolation_harness import Harness
from .isolation_host import HostSuite
from .isolation_life import LifeSuite
from .isolation_snapshots import SnapshotSuite
from .isolation_terminal import TerminalSuite


class IsolationSuite(LifeSuite, ExecSuite, TerminalSuite, HostSuite, SnapshotSuite):
    """All of it."""

    @pytest.fixture
    def harness(self, tmp_path: Path) -> Harness:
        """To be overridden."""
        raise NotImplementedError

    @pytest.fixture
    async def isolation(self, harness: Harness) -> AsyncIterator[Isolation]:
        """A started plug-in; at the end nothing may be left of any sandbox."""
        async with harness.started() as isolation:
            yield isolation
            left = await isolation.list_owned()
            assert left == frozenset(), f"left over: {left}"  # noqa: S101 -- a test suite

    @pytest.fixture
    async def workload(self, harness: Harness, isolation: Isolation) -> AsyncIterator[Workload]:
        """A running sandbox without an entrypoint."""
        async with harness.sandbox(isolation, env={"GREETING": "hello"}) as workload:
            yield workload


__all__ = ["Harness", "IsolationSuite"]
