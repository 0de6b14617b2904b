"""Bytes from one stream to another, as they are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hiverd.egress.stream import Stream

Admit = Callable[[bytes], bool | None]
"""Judges how a stream begins; None: more bytes are needed to tell."""


async def relay(one: Stream, other: Stream, admit: Admit | None = None) -> None:
    """Bytes as they are, both ways, until both directions have ended. Raises `OSError` when one side breaks off, or
    `admit` refuses what `one` begins with."""
    tasks = [asyncio.ensure_future(_pump(one, other, admit)), asyncio.ensure_future(_pump(other, one))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, OSError):
            raise outcome


async def _pump(source: Stream, target: Stream, admit: Admit | None = None) -> None:
    if admit is not None and not await _admitted(source, admit):
        raise ConnectionAbortedError
    while data := await source.read():
        await target.write(data)
    target.end()
    if not (source.half_closes and target.half_closes):
        raise _EndedError


class _EndedError(Exception):
    """One direction has ended, and the other cannot go on without it."""


async def _admitted(source: Stream, admit: Admit) -> bool:
    """Whether the source may go on. What was read to tell is given back."""
    begun = b""
    while data := await source.read():
        begun += data
        admitted = admit(begun)
        if admitted is not None:
            source.unread = begun
            return admitted
    source.unread = begun
    return True
