from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hiver_storage.gdrive import entries as drive
from hiver_storage.names import QUOTE, split
from hiver_storage.onedrive import naming as onedrive

SPECIAL = [
    *"/*:? .~$_vtiCONcon\0\n",
    QUOTE,
    "\uf02a",
    "\uf02e",
    "\uf020",
    "\uf02f",
    "\udcff",
    "\udc80",
    "\uf7ff",
    "\uf780",
    "é",
]
pieces = st.sampled_from([*SPECIAL, "CON", "~$", "_vti_", ".symlink", ".lock", "desktop.ini", "ab"])
names = st.lists(pieces, max_size=8).map("".join)
posix = names.map(lambda name: name.replace("/", "").replace("\0", "")).filter(lambda name: name not in {"", ".", ".."})


def taken_by_onedrive(name: str) -> bool:
    return not (
        set(name) & set('"*:<>?/\\|\n\0')
        or any("\udc80" <= char <= "\udcff" for char in name)
        or name != name.strip(" ")
        or name.endswith(".")
        or name.startswith("~$")
        or "_vti_" in name.casefold()
        or name.casefold() in {"con", ".lock", "desktop.ini"}
    )


def is_link(name: str) -> bool:
    return name.casefold().endswith(".symlink")


@given(posix)
@example("a.symlink" + QUOTE)
@example(QUOTE + "con")
@example("...")
@example("_vti_vti_VTI_")
def test_any_name_has_one_in_onedrive(name: str) -> None:
    (made,) = onedrive.encode([name])
    assert onedrive.decode(made) == name
    assert taken_by_onedrive(made)
    assert not is_link(made)


@given(names.filter(lambda name: taken_by_onedrive(name) and not is_link(name)))
def test_names_that_others_made_in_onedrive_are_reached(name: str) -> None:
    assert onedrive.encode([onedrive.decode(name)]) == (name,)


@given(posix)
def test_any_name_has_one_in_drive(name: str) -> None:
    made = drive.to_drive(name)
    made.encode()
    assert drive.from_drive(made) == name


@given(st.one_of(names.filter(lambda name: not any("\udc80" <= char <= "\udcff" for char in name)), st.text()))
@example("")
@example("..")
@example("a/b")
@example("a\uf02fb")
def test_any_name_of_drive_is_shown_and_leads_back(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        return
    shown = drive.from_drive(name)
    assert "/" not in shown
    assert shown not in {"", ".", ".."}
    assert drive.to_drive(shown) == name


def test_what_is_plain_stays() -> None:
    for name in ("notes.txt", "ünï 文件", ".hidden", "...a", "a b", "100%", "#1", "conx", "a.symlinks"):
        assert onedrive.encode([name]) == (name,)
        assert drive.to_drive(name) == drive.from_drive(name) == name
    assert onedrive.encode(["a:b", " c", "d."]) == ("a\uf03ab", "\uf020c", "d\uf02e")


@pytest.mark.parametrize("path", ["", "a", "/a/", "//a", "/a//b", "/a/../b", "/..", "/.", "/a/./b", "/a\0b"])
def test_paths_that_are_not_clean_are_refused(path: str) -> None:
    with pytest.raises(OSError, match="clean"):
        split(path)


def test_clean_paths() -> None:
    assert split("/") == []
    assert split("/a/..b/c") == ["a", "..b", "c"]
