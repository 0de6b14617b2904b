"""Which folders of the host a caller may mount."""

from __future__ import annotations

from pathlib import Path

import pytest

from hiverd.contracts.errors import InvalidError
from hiverd.sandboxes.origins import resolve_origin

FIELD = "fs[0].origin"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "shared/sub").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "shared"


def test_folders_below_a_root(folder: Path) -> None:
    for origin in (str(folder / "sub"), "shared/sub", "./shared/../shared/sub"):
        assert resolve_origin(origin, [folder], field=FIELD) == folder / "sub"
    assert resolve_origin(str(folder), [folder], field=FIELD) == folder


@pytest.mark.parametrize(
    "origin",
    ["/", "/etc", "outside", "shared/../outside", "shared/link", "..", "shared/none", "", "a\0b", "shared/loop",
     "shared/" + "x" * 5000],
)  # fmt: skip
def test_others_are_refused(folder: Path, origin: str) -> None:
    (folder / "link").symlink_to("../outside")
    (folder / "loop").symlink_to("loop")
    with pytest.raises(InvalidError) as refused:
        resolve_origin(origin, [folder], field=FIELD)
    assert refused.value.field == FIELD
    assert str(folder) not in refused.value.message


def test_a_sibling_with_the_roots_name_as_a_prefix_is_refused(folder: Path) -> None:
    (folder.parent / "shared-not").mkdir()
    with pytest.raises(InvalidError):
        resolve_origin("shared-not", [folder], field=FIELD)


def test_without_roots_everything_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidError, match="origin_roots"):
        resolve_origin(str(folder), [], field=FIELD)
