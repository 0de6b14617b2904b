"""What is decided without I/O."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from hiverd.remote.cache import victims
from hiverd.remote.conflicts import conflict_name
from hiverd.remote.ranges import Ranges, aligned, parts
from hiverd.remote.schedule import Schedule, due_after_close, retry_pause
from hiverd.remote.state import Row

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12)


@given(SPANS, st.integers(0, 60), st.integers(0, 60))
def test_ranges_are_sets_of_bytes(spans, start, end):
    ranges, model = Ranges(), set()
    for low, high in spans:
        new = set(range(low, high)) - model
        assert ranges.add(low, high) == len(new)
        model |= new
    pairs = list(ranges)
    assert {byte for low, high in pairs for byte in range(low, high)} == model
    assert all(before[1] < after[0] for before, after in itertools.pairwise(pairs))
    assert ranges.total == len(model)
    asked = set(range(start, end))
    assert ranges.covers(start, end) == (asked <= model)
    assert {byte for low, high in ranges.missing(start, end) for byte in range(low, high)} == asked - model
    assert Ranges.decode(ranges.encode()) == ranges


def test_requests_are_whole_blocks_within_the_file():
    assert aligned(5, 11, 4, 100) == (4, 12)
    assert aligned(5, 11, 4, 10) == (4, 10)
    assert parts([(0, 10), (20, 21)], 4) == [(0, 4), (4, 8), (8, 10), (20, 21)]


def test_an_upload_waits_for_quiet_but_not_for_ever():
    def due(now, first):
        return due_after_close(now=now, first_change=first, quiet_seconds=0.75, longest_seconds=3)

    assert due(10, 10) == 10.75
    assert due(12.9, 10) == 13
    assert due(20, 10) == 20


def test_pauses_grow_up_to_a_bound():
    def pause(attempts, dice=lambda: 0.0):
        return retry_pause(attempts, first=1, longest=60, dice=dice)

    assert [pause(n) for n in (1, 2, 3, 6, 7, 5000)] == [1, 2, 4, 32, 60, 60]
    assert pause(7, dice=lambda: 1.0) == 30


@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 50))), max_size=40))
def test_each_key_is_due_once_at_its_newest_time(steps):
    schedule, model = Schedule[int](), {}
    for key, due in steps:
        if due is None:
            schedule.drop(key)
            model.pop(key, None)
        else:
            schedule.put(key, due)
            model[key] = due
        assert schedule.next_due() == (min(model.values()) if model else None)
    order = []
    while (key := schedule.pop(100)) is not None:
        order.append(model.pop(key))
    assert order == sorted(order)
    assert not model
    assert not len(schedule)


def test_nothing_is_due_early():
    schedule = Schedule[str]()
    schedule.put("a", 5)
    assert schedule.pop(4.9) is None
    assert schedule.pop(5) == "a"


def test_conflict_names():
    moment = 1_795_537_812
    name = "notes (conflict 2026-11-24 16.30.12).txt"
    assert conflict_name("notes.txt", moment, set()) == name
    assert conflict_name("notes.txt", moment, {name}) == "notes (conflict 2026-11-24 16.30.12 2).txt"
    assert conflict_name(".profile", moment, set()) == ".profile (conflict 2026-11-24 16.30.12)"
    assert conflict_name("Makefile", moment, set()) == "Makefile (conflict 2026-11-24 16.30.12)"
    long = conflict_name("ü" * 120 + ".txt", moment, set())
    assert len(long.encode()) <= 255
    assert long.endswith("ü (conflict 2026-11-24 16.30.12).txt")


def test_the_least_used_go_first_and_the_busy_stay():
    rows = [Row(path, "file", "v", 10, 0, cached=10) for path in "abcd"]
    assert victims(rows, {"b"}, 15) == ["a", "c"]
    assert victims(rows, set(), 0) == []
    assert victims(rows, set("abcd"), 10) == []
