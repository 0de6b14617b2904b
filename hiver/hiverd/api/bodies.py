"""Judging what callers send without making everyone else wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

T = TypeVar("T")

INLINE_BYTES: Final = 256 * 1024
"""Bodies up to this size are judged where they are: a thread would cost more than it saves."""

_judge = ThreadPoolExecutor(1, thread_name_prefix="judge")
"""One thread: large bodies wait for each other, and never hold the threads that other work needs."""


async def judged(raw: bytes, judge: Callable[[bytes], T]) -> T:
    """What `judge` returns or raises. A large body is judged in a thread: a hostile one may take most of a second."""
    if len(raw) <= INLINE_BYTES:
        return judge(raw)
    return await asyncio.get_running_loop().run_in_executor(_judge, judge, raw)
