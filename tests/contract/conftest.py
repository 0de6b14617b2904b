"""Client processes for the contract tests: one per release and worker, started on first use."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from support.clients import Driver
from support.server import Server


@pytest.fixture(scope="session")
def driver_of(server: Server) -> Iterator[Callable[[str], Driver]]:
    """The process that drives this release against the worker's server."""
    drivers: dict[str, Driver] = {}

    def get(version: str) -> Driver:
        if version not in drivers:
            drivers[version] = Driver(version, server.url)
        return drivers[version]

    yield get
    for driver in drivers.values():
        driver.close()
