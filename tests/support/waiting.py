"""Waiting for something to become true, with a deadline instead of a sleep that hopes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.05


def until(probe: Callable[[], T | None], *, seconds: float, what: str) -> T:
    """The first truthy answer of `probe`; `TimeoutError` naming `what` when none came in time."""
    deadline_monotonic = time.monotonic() + seconds
    while True:
        answer = probe()
        if answer:
            return answer
        if time.monotonic() > deadline_monotonic:
            msg = f"not within {seconds:g} s: {what} (last answer: {answer!r})"
            raise TimeoutError(msg)
        time.sleep(POLL_SECONDS)


async def until_async(probe: Callable[[], Awaitable[T | None]], *, seconds: float, what: str) -> T:
    """Like `until`, for a probe that must be awaited."""
    deadline_monotonic = time.monotonic() + seconds
    while True:
        answer = await probe()
        if answer:
            return answer
        if time.monotonic() > deadline_monotonic:
            msg = f"not within {seconds:g} s: {what} (last answer: {answer!r})"
            raise TimeoutError(msg)
        await asyncio.sleep(POLL_SECONDS)
