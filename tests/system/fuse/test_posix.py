"""A governed mount with full access behaves as the folder below it, but for a list that docs/files.md gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.server import REPOSITORY
from system.fuse.conftest import MakeMount
from system.fuse.deviations import DEVIATIONS
from system.fuse.scenarios import SCENARIOS, Scenario


@pytest.mark.parametrize("options", [{}, {"shared": True, "threads": 4}], ids=["owned", "shared"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_as_on_the_folder(scenario: Scenario, options: dict[str, object], mount: MakeMount, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    expected = scenario(plain)
    assert scenario(mount(**options).path) == expected


@pytest.mark.parametrize("name", DEVIATIONS)
def test_deviations_are_real(name: str, mount: MakeMount, tmp_path: Path) -> None:
    scenario, answer = DEVIATIONS[name]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert scenario(mount().path) == answer
    assert scenario(plain) != answer, "there is no deviation any more: take it out of the list"


def test_the_list_is_complete() -> None:
    text = (REPOSITORY / "docs" / "files.md").read_text()
    section = text.split("\n## Deviations\n")[1].split("\n## ")[0]
    told = set(re.findall(r"^- \*\*(.+?)\*\*", section.split("\n### ")[0], re.MULTILINE))
    assert told == set(DEVIATIONS)
