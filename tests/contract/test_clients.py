"""Every scenario with every selected release of the published client, unmodified (PROTOCOL 1.3, 1.4)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from contract.scenarios.registry import Scenario, load
from support.clients import ALL_VERSIONS, Driver, selected_versions, version_tuple

pytestmark = pytest.mark.contract


def _releases(scenario: Scenario) -> list[str]:
    """The selected releases that a scenario covers."""
    return [version for version in selected_versions() if scenario.covers(version_tuple(version))]


def _marks(scenario: Scenario) -> list[pytest.MarkDecorator]:
    return [pytest.mark.timeout(scenario.seconds + 60), *([pytest.mark.slow] if scenario.slow else [])]


def _cases() -> list[object]:
    return [
        pytest.param(version, scenario, id=f"{scenario.name}-{version}", marks=_marks(scenario))
        for scenario in load().values()
        if not scenario.waits
        for version in _releases(scenario)
    ]


def _waiting() -> list[object]:
    waiting = [scenario for scenario in load().values() if scenario.waits]
    return [pytest.param(scenario, id=scenario.name, marks=_marks(scenario)) for scenario in waiting]


@pytest.mark.parametrize(("version", "scenario"), _cases())
def test_client(version: str, scenario: Scenario, driver_of: Callable[[str], Driver]) -> None:
    driver_of(version).run(scenario.name, seconds=scenario.seconds)


@pytest.mark.parametrize("scenario", _waiting())
def test_clients_that_wait(scenario: Scenario, driver_of: Callable[[str], Driver]) -> None:
    """All releases at the same time; each failure is told."""
    drivers = [driver_of(version) for version in _releases(scenario)]
    with ThreadPoolExecutor(max(1, len(drivers))) as pool:
        runs = [pool.submit(driver.run, scenario.name, seconds=scenario.seconds) for driver in drivers]
    failures = [str(error) for error in (run.exception() for run in runs) if error is not None]
    assert not failures, "\n".join(failures)


def test_every_selected_release_was_published() -> None:
    assert set(selected_versions()) <= set(ALL_VERSIONS)
