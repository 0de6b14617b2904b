"""What the contract itself decides: keys, versions, whole content."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta, timezone

import pytest

from hiverd.contracts.snapshot import (
    SnapshotDamagedError,
    SnapshotInfo,
    closing,
    is_snapshot_key,
    new_version,
    verified,
    version_time,
)
from hiverd.testing.snapshot_harness import pieces

NOW = datetime(2026, 11, 24, 21, 15, 3, 123456, UTC)


def test_a_version_holds_its_time() -> None:
    version = new_version(NOW)
    assert version.startswith("20261124T211503123456Z-")
    assert version_time(version) == NOW
    assert new_version(NOW.astimezone(timezone(timedelta(hours=5)))).startswith("20261124T211503123456Z-")
    assert version_time(new_version(NOW.replace(microsecond=0))) == NOW.replace(microsecond=0)


def test_versions_of_one_moment_differ_and_are_in_order() -> None:
    made = [new_version(NOW)]
    for _ in range(100):
        made.append(new_version(NOW, made[-1]))
    assert made == sorted(set(made))
    assert len({new_version(NOW) for _ in range(100)}) == 100


def test_a_clock_that_was_set_back_changes_no_order() -> None:
    newest = new_version(NOW)
    assert new_version(NOW - timedelta(days=400), newest) > newest
    assert version_time(new_version(NOW + timedelta(seconds=1), newest)) == NOW + timedelta(seconds=1)


@pytest.mark.parametrize("text", ["", "x", "20261124T211503123456Z", "20261324T211503123456Z-00000000", "../x"])
def test_what_is_no_version(text: str) -> None:
    assert version_time(text) is None
    assert new_version(NOW, text).startswith("20261124T211503123456Z-")


def test_keys() -> None:
    for good in ("a", "A.b_c-9", "x" * 64, ".a", "...", "-rf"):
        assert is_snapshot_key(good)
    for bad in ("", ".", "..", "a/b", "x" * 65, "a b", "a\n", "ä", "a\0"):
        assert not is_snapshot_key(bad)


@pytest.mark.parametrize("content", [[b"abd"], [b"ab"], [b"abc", b"d"], []])
async def test_other_content_never_ends_well(content: list[bytes]) -> None:
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    info = SnapshotInfo(key="demo", version=new_version(NOW), bytes=3, created_at=NOW, sha256=sha256)
    assert [piece async for piece in verified(info, pieces(b"a", b"bc"))] == [b"a", b"bc"]
    with pytest.raises(SnapshotDamagedError, match="demo"):
        [_ async for _ in verified(info, pieces(*content))]


async def test_what_is_not_read_to_its_end_is_closed() -> None:
    closed = []

    async def content() -> AsyncIterator[bytes]:
        try:
            yield b"a"
            yield b"b"
        finally:
            closed.append(True)

    async with closing(content()) as opened:
        assert await anext(opened) == b"a"
    assert closed
