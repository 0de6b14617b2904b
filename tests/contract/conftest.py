"""Client processes for the contract tests: one per release and worker, started on first use."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from support.clients import ALL_VERSIONS, Driver
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What differs between releases has nothing to do with isolation: on a second plug-in the newest one is enough, and
    without what takes a minute on purpose."""
    if config.getoption("--backend") is not None:
        return
    spared = [item for item in items if _is_spared(item)]
    if spared:
        config.hook.pytest_deselected(items=spared)
        gone = set(spared)
        items[:] = [item for item in items if item not in gone]


def _is_spared(item: pytest.Item) -> bool:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if parameters.get("isolated_by") != "docker":
        return False
    older = parameters.get("version", ALL_VERSIONS[-1]) != ALL_VERSIONS[-1]
    return older or item.get_closest_marker("slow") is not None
