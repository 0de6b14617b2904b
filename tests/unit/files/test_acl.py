"""Rules against a reading of the specification that is as simple as can be, and the cases that people ask about."""

from __future__ import annotations

import re
import timeit
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiverd.files.acl import MAX_REMEMBERED_PATHS, Access, Rules, relative_to_mount
from hiverd.wire.model import AclRule


def rules(*pairs: tuple[str, Access], mount: str = "/data", case_sensitive: bool = True) -> Rules:
    return Rules([AclRule(path=path, access=access) for path, access in pairs], mount, case_sensitive=case_sensitive)


# --- the reference ---


def _expression(pattern: str) -> re.Pattern[str]:
    parts = []
    for segment in pattern.split("/")[1:]:
        if segment == "**":
            parts.append("(?:/[^/]+)*")
        else:
            body = "".join({"*": "[^/]*", "?": "[^/]"}.get(character, re.escape(character)) for character in segment)
            parts.append("/" + body)
    return re.compile("".join(parts), re.DOTALL)


def _literal(pattern: str) -> int:
    if pattern.endswith("/**") and not re.search(r"[*?]", pattern[:-3]):
        return len(pattern) - 3
    found = re.search(r"[*?]", pattern)
    return found.start() if found else len(pattern)


def _own(pairs: list[tuple[str, Access]], path: str) -> Access:
    clean = "" if path == "/" else path
    matching = [
        (-_literal(pattern), index, access)
        for index, (pattern, access) in enumerate(pairs)
        if _expression(pattern).fullmatch(clean)
    ]
    return min(matching)[2] if matching else "deny"


def reference(pairs: list[tuple[str, Access]], path: str) -> Access:
    if not pairs:
        return "rw"
    names = path.split("/")[1:] if path != "/" else []
    above = ["/", *("/" + "/".join(names[: depth + 1]) for depth in range(len(names)))]
    found = [_own(pairs, step) for step in above]
    return "deny" if "deny" in found else found[-1]


accesses = st.sampled_from(["rw", "ro", "deny"])
names = st.text("ab.", min_size=1, max_size=3).filter(lambda name: name not in {".", ".."})
pattern_segments = st.one_of(names, st.sampled_from(["*", "**", "?", "a*", "*b", "?a", "*.b", "a?*"]))
patterns = st.lists(pattern_segments, max_size=4).map(lambda segments: "".join(f"/{one}" for one in segments))
paths = st.lists(names, max_size=4).map(lambda segments: "".join(f"/{one}" for one in segments) or "/")
rule_lists = st.lists(st.tuples(patterns, accesses), max_size=6)


@given(rule_lists, paths)
def test_as_the_reference(pairs: list[tuple[str, Access]], path: str) -> None:
    # "/m" as the mount: no pattern here begins with it, so all are read relative to it.
    compiled = rules(*pairs, mount="/m")
    expected = reference(pairs, path)
    assert compiled.access(path) == expected
    assert compiled.access(path) == expected, "the remembered decision differs"


@given(rule_lists, paths)
def test_patterns_may_be_written_with_the_mount(pairs: list[tuple[str, Access]], path: str) -> None:
    absolute = [("/m" + pattern, access) for pattern, access in pairs]
    assert rules(*absolute, mount="/m/").access(path) == reference(pairs, path)


@given(rule_lists, paths, st.lists(names, min_size=1, max_size=3))
def test_nothing_is_withheld_below_what_is_said_to_be_free(
    pairs: list[tuple[str, Access]], folder: str, below: list[str]
) -> None:
    compiled = rules(*pairs, mount="/m")
    if compiled.access(folder) == "rw" and not compiled.withholds_below(folder):
        assert compiled.access("/".join([folder.rstrip("/"), *below])) == "rw"


@given(rule_lists, paths)
def test_fully_open_mounts_withhold_nothing(pairs: list[tuple[str, Access]], path: str) -> None:
    if rules(*pairs, mount="/m").fully_open:
        assert reference(pairs, path) == "rw"


@given(rule_lists, paths)
def test_case_does_not_matter_where_the_store_folds_it(pairs: list[tuple[str, Access]], path: str) -> None:
    shouted = rules(*((pattern.upper(), access) for pattern, access in pairs), mount="/m", case_sensitive=False)
    assert shouted.access(path) == reference(pairs, path) == shouted.access(path.upper())


# --- what people ask ---


@pytest.mark.parametrize(
    ("path", "access"),
    [
        ("/", "rw"),
        ("/src/main.py", "rw"),
        ("/secret", "deny"),
        ("/secret/deep/file", "deny"),
        ("/secret/public/file", "deny"),  # the folder above is denied
        ("/secrets", "rw"),
        ("/docs", "ro"),
        ("/docs/a", "ro"),
        ("/docs/drafts/a", "rw"),
        ("/app/.env", "deny"),
        ("/app/deep/down/.env", "deny"),
        ("/app/.envrc", "rw"),
    ],
)
def test_a_usual_list(path: str, access: Access) -> None:
    compiled = rules(
        ("/data/**", "rw"),
        ("/data/secret/**", "deny"),
        ("/data/secret/public/**", "rw"),
        ("/docs/**", "ro"),
        ("/docs/drafts/**", "rw"),
        ("/data/**/.env", "deny"),
    )
    assert compiled.access(path) == access


def test_no_rules_are_one_that_gives_everything() -> None:
    assert rules().access("/any/thing") == "rw"
    assert rules().fully_open


def test_a_mount_whose_root_matches_nothing_is_denied_throughout() -> None:
    assert rules(("/data/open/**", "rw")).access("/open/file") == "deny"


def test_of_equals_the_earlier_decides() -> None:
    assert rules(("/a", "ro"), ("/a/**", "deny"), ("/**", "rw")).access("/a") == "ro"
    assert rules(("/a/**", "deny"), ("/a", "ro"), ("/**", "rw")).access("/a") == "deny"


@pytest.mark.parametrize(
    ("pairs", "is_open"),
    [
        ([("/data/**", "rw")], True),
        ([("/**", "rw"), ("/x", "rw")], True),
        ([("/**", "rw"), ("/x", "ro")], False),
        ([("/x/**", "rw")], False),
        ([("/data", "rw")], False),
        ([("/data/*", "rw"), ("/data", "rw")], False),
    ],
)
def test_fully_open(pairs: list[tuple[str, Access]], is_open: bool) -> None:
    assert rules(*pairs).fully_open is is_open


def test_unicode_forms_are_one_name_where_the_store_folds_them() -> None:
    composed, apart = unicodedata.normalize("NFC", "/Ä"), unicodedata.normalize("NFD", "/ä")
    folded = rules(("/**", "rw"), (composed + "/**", "deny"), case_sensitive=False)
    exact = rules(("/**", "rw"), (composed + "/**", "deny"))
    assert (folded.access(apart), exact.access(apart), exact.access(composed)) == ("deny", "rw", "deny")


def test_relative_patterns() -> None:
    assert relative_to_mount("/data/a/", "/data") == "/a"
    assert relative_to_mount("data", "/data") == ""
    assert relative_to_mount("/database", "/data") == "/database"
    assert relative_to_mount("/other//./x", "/data") == "/other/x"


def test_decisions_are_kept_up_to_a_bound() -> None:
    compiled = rules(("/**", "rw"))
    for number in range(3 * MAX_REMEMBERED_PATHS):
        compiled.access(f"/{number}")
        assert len(compiled._remembered) <= MAX_REMEMBERED_PATHS


def _microseconds(work: str, names: dict[str, object]) -> float:
    return min(timeit.repeat(work, globals=names, number=2000, repeat=5)) / 2000 * 1e6


def test_a_long_list_costs_no_more_than_a_short_one() -> None:
    few = rules(("/**", "rw"), ("/docs/**", "ro"), ("**/.env", "deny"))
    many = rules(
        ("/**", "rw"),
        *((f"/docs/d{number}/**", "ro") for number in range(400)),
        *((f"/docs/d{number}/f", "deny") for number in range(300)),
        *((f"/**/*.ext{number}", "ro") for number in range(300)),
    )
    path = "/src/package/module/file.py"
    short = _microseconds("own_access(path)", {"own_access": few.own_access, "path": path})
    long = _microseconds("own_access(path)", {"own_access": many.own_access, "path": path})
    assert long < 10 * short + 10
    for earlier, later in pairwise(["/docs/d7", "/docs/d7/f"]):
        assert (many.access(earlier), many.access(later)) == ("ro", "deny")
