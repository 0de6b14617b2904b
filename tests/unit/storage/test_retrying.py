from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator

import pytest

from hiver_storage.retrying import Locks, Patience, TransientError, exactly, in_blocks


async def source(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


@pytest.mark.parametrize("size", [0, 9, 11])
async def test_a_wrong_size_is_told_before_the_end_is_given(size: int) -> None:
    given = b""

    async def take() -> None:
        nonlocal given
        async for piece in exactly(source(b"01234", b"", b"56789"), size):
            given += piece

    with pytest.raises(OSError, match="size") as caught:
        await take()
    assert caught.value.errno == errno.EINVAL
    assert len(given) < max(size, 1)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([], []),
        ([b"", b""], []),
        ([b"0123"], [b"0123"]),
        ([b"01", b"23", b"45"], [b"0123", b"45"]),
        ([b"01234567"], [b"0123", b"4567"]),
        ([b"0123456789", b"ab"], [b"0123", b"4567", b"89ab"]),
    ],
)
async def test_blocks(pieces: list[bytes], expected: list[bytes]) -> None:
    size = sum(map(len, pieces))
    assert [block async for block in in_blocks(source(*pieces), size, 4)] == expected


async def test_patience_ends_with_the_last_error() -> None:
    attempts = 0

    async def attempt() -> None:
        nonlocal attempts
        attempts += 1
        raise TransientError(errno.EAGAIN, "busy")

    with pytest.raises(BlockingIOError, match="busy") as caught:
        await Patience(0.5).repeat(attempt)
    assert 2 <= attempts <= 5
    assert caught.value.__cause__ is None


async def test_what_the_service_asks_for_is_kept_or_told_at_once() -> None:
    async def attempt() -> None:
        raise TransientError(errno.EAGAIN, "busy", retry_after_seconds=3600)

    async with asyncio.timeout(5):
        with pytest.raises(BlockingIOError):
            await Patience(10).repeat(attempt)


async def test_locks_exclude_and_are_forgotten() -> None:
    locks = Locks()
    inside: list[str] = []

    async def work(*keys: str) -> None:
        async with locks(*keys):
            assert not set(keys) & set(inside)
            inside.extend(keys)
            await asyncio.sleep(0)
            for key in keys:
                inside.remove(key)

    async with asyncio.timeout(10):
        await asyncio.gather(*(work(*keys) for _ in range(50) for keys in (("a", "b"), ("b", "a"), ("b",), ("c", "c"))))
    async with locks("a"):
        waiting = asyncio.create_task(work("b", "a"))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await work("b")
    assert locks._held == {}
