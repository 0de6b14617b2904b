"""Events of fanotify without a kernel: what is read, what waits, and where directories are."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiverd.files import fanotify, watch_pairs
from hiverd.files.fanotify import FileEvent
from hiverd.files.watch_pairs import Access, Budget, Pending, Place
from hiverd.files.watch_places import CACHED_PLACES, Places

FSID = b"12345678"


def handle(number: int) -> bytes:
    return struct.pack("=IiQ", 8, 1, number)


def record(kind: int, fsid: bytes, directory: bytes, name: bytes | None = None) -> bytes:
    body = fsid + directory + (b"" if name is None else name + b"\0")
    body += bytes(-len(body) % 4)
    return struct.pack("=BBH", kind, 0, 4 + len(body)) + body


def raw(event: FileEvent) -> bytes:
    """As `copy_event_to_user` of the kernel writes it."""
    records = b""
    if event.directory:
        records += record(2 if event.name else 3, event.fsid, event.directory, event.name or None)
    if event.itself:
        records += record(1, event.fsid, event.itself)
    return struct.pack("=IBBHQii", 24 + len(records), 3, 0, 24, event.mask, -1, event.pid) + records


HANDLES = st.integers(0, 1 << 63).map(handle)
EVENTS = st.builds(
    FileEvent,
    fsid=st.binary(min_size=8, max_size=8),
    mask=st.integers(1, (1 << 31) - 1),
    pid=st.integers(0, 1 << 22),
    directory=HANDLES,
    name=st.binary(max_size=255).map(lambda name: name.replace(b"\0", b"")),
    itself=st.just(b"") | HANDLES,
)


@given(st.lists(EVENTS))
def test_what_is_written_is_read(events: list[FileEvent]) -> None:
    buffer = b"".join(map(raw, events))
    assert list(fanotify.parse(buffer)) == events
    assert [fsid for _, fsid in fanotify.positions(buffer)] == [event.fsid for event in events]


@pytest.mark.parametrize("first", [True, False])
def test_an_overflow_has_no_record(first: bool) -> None:
    overflow = FileEvent(b"", fanotify.QUEUE_OVERFLOW, 0, b"", b"", b"")
    other = FileEvent(FSID, fanotify.DELETE, 7, handle(1), b"a", handle(2))
    events = [overflow, other] if first else [other, overflow]
    assert list(fanotify.parse(b"".join(map(raw, events)))) == events


def test_what_is_no_event_is_refused() -> None:
    with pytest.raises(ValueError, match="version"):
        list(fanotify.parse(struct.pack("=IBBHQii", 24, 4, 0, 24, 1, -1, 1)))
    with pytest.raises(ValueError, match="bytes"):
        list(fanotify.parse(bytes(100)))


# -- pending -----------------------------------------------------------------------------------------------------------


def add(pending: Pending, name: bytes, directory: bytes = b"/w/d") -> None:
    pending.add("write", Place.at("/w", b"/w", directory), name)


def test_equal_accesses_are_one_until_they_are_taken() -> None:
    pending = Pending(Budget())
    for name in (b"a", b"b", b"a"):
        add(pending, name)
    assert pending.take() == [Access("write", "/w", b"/w/d/a"), Access("write", "/w", b"/w/d/b")]
    add(pending, b"a")
    assert len(pending.take()) == 1


def test_too_many_become_coarser_and_stay_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_pairs, "FINE_BYTES", 10_000)
    monkeypatch.setattr(watch_pairs, "COARSE_BYTES", 20_000)
    budget = Budget()
    pending = Pending(budget)
    for number in range(1000):
        add(pending, b"%d" % number, b"/w/%d" % (number % 500))
    taken = pending.take()
    paths = [access.path for access in taken]
    assert b"/w/0/0" in paths
    assert b"/w/40/*" in paths
    assert paths[-1] == b"/w/**"
    assert paths.count(b"/w/**") == 1
    assert budget.used_bytes < 21_000
    assert pending.take_coarse() == 1000 - len([path for path in paths if not path.endswith(b"*")])
    assert pending.take_coarse() == 0
    add(pending, b"still taken")
    assert pending.take()[0].path == b"/w/**"
    pending.told(taken)
    pending.told([Access("write", "/w", b"/w/**")])
    assert budget.used_bytes == 0
    add(pending, b"fine")
    assert pending.take()[0].path == b"/w/d/fine"


def test_one_sandbox_cannot_take_what_all_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_pairs, "TOTAL_BYTES", 1000)
    budget = Budget()
    many = [Pending(budget) for _ in range(100)]
    for pending in many:
        for number in range(100):
            add(pending, b"%d" % number)
    assert budget.used_bytes < 1000 + len(many) * 300


def test_unknown_accesses_are_told_of_every_mount() -> None:
    pending = Pending(Budget())
    pending.add_unknown({b"/w": "/w", b"/": "/"}, 5)
    paths = [(access.operation, access.path) for access in pending.take()]
    assert paths == [(operation, path) for path in (b"/w/**", b"/**") for operation in ("read", "write", "delete")]
    assert pending.take_coarse() == 5


# -- places ------------------------------------------------------------------------------------------------------------


class Tree(Places):
    """Directories by handle, without a file system."""

    def __init__(self, paths: Mapping[int, bytes]) -> None:
        super().__init__(b"/v/mounts", -1, {b"w": ("/w", b"/w"), b"root": ("/", b"/")})
        self.paths = {handle(number): path for number, path in paths.items()}
        self.looks = 0

    def _path_of(self, handle: bytes) -> bytes | None:
        self.looks += 1
        return self.paths.get(handle)

    def path(self, number: int, gone: Mapping[bytes, tuple[bytes, bytes]] | None = None) -> bytes | None:
        place = self.of(handle(number), lambda: gone or {})
        return place and place.path


def test_paths_as_the_agent_sees_them() -> None:
    tree = Tree(
        {1: b"/v/mounts/w", 2: b"/v/mounts/w/a/b", 3: b"/v/root/etc", 4: b"/v/mounts/wx/a", 5: b"/v/mounts/root/a"}
    )
    assert [tree.path(number) for number in (1, 2, 3, 4, 5)] == [b"/w", b"/w/a/b", None, None, b"/a"]
    assert [tree.path(number) for number in (1, 2, 3, 4, 5)] == [b"/w", b"/w/a/b", None, None, b"/a"]
    assert tree.looks == 5
    assert tree.of(handle(2), dict) == Place("/w", b"/w", b"/w/a/b", b"/w/a/b/")


def test_moves_and_changes_are_not_missed() -> None:
    tree = Tree({2: b"/v/mounts/w/a"})
    assert tree.path(2) == b"/w/a"
    tree.paths[handle(2)] = b"/v/mounts/w/b"
    tree.forget()
    assert tree.path(2) == b"/w/b"
    tree.change({b"w": ("/other", b"/other")})
    assert tree.path(2) == b"/other/b"


def test_the_removed_are_found_by_their_removal() -> None:
    tree = Tree({1: b"/v/mounts/w", 9: b"/v/root"})
    gone = {handle(4): (handle(3), b"c"), handle(3): (handle(2), b"b"), handle(2): (handle(1), b"a")}
    assert tree.path(4, gone) == b"/w/a/b/c"
    assert tree.path(3, gone) == b"/w/a/b"
    assert tree.path(8, {handle(8): (handle(9), b"x")}) is None
    unknown = tree.of(handle(77), dict)
    assert unknown is not None
    assert (unknown.path, unknown.known) == (b"/w", False)
    loop = {handle(5): (handle(6), b"x"), handle(6): (handle(5), b"y")}
    assert tree.path(5, loop) == b"/w"


def test_a_new_directory_is_known_before_it_can_be_removed() -> None:
    tree = Tree({1: b"/v/mounts/w", 9: b"/v/root"})
    assert (tree.path(1), tree.path(9)) == (b"/w", None)
    tree.learn(handle(2), handle(1), b"new")
    tree.learn(handle(3), handle(2), b"inner")
    tree.learn(handle(4), handle(9), b"elsewhere")
    assert [tree.path(number) for number in (2, 3, 4)] == [b"/w/new", b"/w/new/inner", None]
    assert tree.looks == 2


def test_the_cache_is_bounded() -> None:
    tree = Tree({number: b"/v/mounts/w/%d" % number for number in range(2 * CACHED_PLACES)})
    tree.paths[handle(0)] = b"/v/mounts/w/" + b"x" * 1000
    for number in range(2 * CACHED_PLACES):
        assert tree.path(number) is not None
    assert len(tree._cache) <= CACHED_PLACES
    assert handle(0) not in tree._cache
