from __future__ import annotations

import json
from typing import Any

import pytest

from hiver_storage.gdrive.entries import FOLDER, Entry, by_shown_name, drive_names, id_in_name, link_properties, parse


def file(name: str, number: int = 1, **members: Any) -> Entry:
    resource = {
        "id": f"1abcDEF_{number:03}-x",
        "name": name,
        "mimeType": "text/plain",
        "size": "3",
        "createdTime": f"2026-01-01T00:00:{number:02}.000Z",
        "modifiedTime": "2026-01-02T03:04:05.678Z",
        "headRevisionId": "r1",
    }
    return parse({**resource, **members})


def document(name: str, kind: str, number: int = 1) -> Entry:
    return file(name, number, mimeType=f"application/vnd.google-apps.{kind}", webViewLink="https://doc", size=None)


def test_of_several_the_newest_has_the_name() -> None:
    shown = by_shown_name([file("a.txt", 2), file("a.txt", 3), file("a.txt", 1), file("b", 4)])
    assert {name: entry.id for name, entry in shown.items()} == {
        "a.txt": "1abcDEF_003-x",
        "a (1abcDEF_002-x).txt": "1abcDEF_002-x",
        "a (1abcDEF_001-x).txt": "1abcDEF_001-x",
        "b": "1abcDEF_004-x",
    }
    assert id_in_name("a (1abcDEF_002-x).txt") == "1abcDEF_002-x"
    assert id_in_name("a (1).txt") is None


def test_long_names_are_cut_and_keep_their_id() -> None:
    entry = file("é" * 200 + ".jpeg")
    (name,) = by_shown_name([entry])
    assert len(name.encode()) <= 255
    assert name.endswith(f"é ({entry.id}).jpeg")
    assert id_in_name(name) == entry.id


def test_a_document_is_a_small_file_that_names_it() -> None:
    entries = [
        document("Plan", "document"),
        file("Plan.gdoc", 2),
        document("Odd", "jam"),
        file("dir", 3, mimeType=FOLDER),
    ]
    shown = by_shown_name(entries)
    assert set(shown) == {"Plan.gdoc", "Plan (1abcDEF_001-x).gdoc", "Odd.glink", "dir"}
    body = shown["Odd.glink"].body
    assert body is not None
    assert json.loads(body)["url"] == "https://doc"
    assert shown["Odd.glink"].size == len(body)
    assert drive_names("Plan.gdoc") == ["Plan.gdoc", "Plan"]


@pytest.mark.parametrize("target", ["", "x", "é" * 700, "/a/" * 1000, "odd\udcffbytes", "'\"\\\n"])
def test_links_fit_into_properties_and_come_back(target: str) -> None:
    properties = link_properties(target)
    assert len(properties) <= 30
    assert all(len(key.encode() + value.encode()) <= 124 for key, value in properties.items())
    assert file("link", properties=properties).link == target


def test_a_target_that_does_not_fit_is_refused() -> None:
    with pytest.raises(OSError, match="longer"):
        link_properties("x" * 4095)


def test_versions_are_of_the_content_and_the_file() -> None:
    assert file("a").version == file("renamed", size="3").version
    assert len({file("a").version, file("a", 2).version, file("a", headRevisionId="r2").version}) == 3


@pytest.mark.parametrize("broken", [{"modifiedTime": "yesterday"}, {"size": "many"}, {"modifiedTime": None}])
def test_what_is_not_understood_is_an_error(broken: dict[str, Any]) -> None:
    with pytest.raises(OSError, match="understood"):
        file("a", **broken)
