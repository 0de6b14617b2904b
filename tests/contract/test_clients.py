"""Every scenario with every selected release of the published client, unmodified (PROTOCOL 1.3, 1.4)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from contract.scenarios.registry import Scenario, load
from support.clients import ALL_VERSIONS, Driver, selected_versions, version_tuple

pytestmark = [pytest.mark.contract, pytest.mark.both_backends]


def _releases(scenario: Scenario) -> list[str]:
    """The releases to run a scenario with: the first and the last one it covers, or all of them."""
    covered = [version for version in selected_versions() if scenario.covers(version_tuple(version))]
    return [covered[0], covered[-1]] if scenario.spread == "ends" and len(covered) > 1 else covered


def _cases() -> list[object]:
    return [
        pytest.param(
            version,
            scenario,
            id=f"{scenario.name}-{version}",
            marks=[pytest.mark.timeout(scenario.seconds + 60), *([pytest.mark.slow] if scenario.slow else [])],
        )
        for scenario in load().values()
        for version in _releases(scenario)
    ]


@pytest.mark.parametrize(("version", "scenario"), _cases())
def test_client(version: str, scenario: Scenario, driver_of: Callable[[str], Driver]) -> None:
    driver_of(version).run(scenario.name, seconds=scenario.seconds)


def test_every_selected_release_was_published() -> None:
    assert set(selected_versions()) <= set(ALL_VERSIONS)
