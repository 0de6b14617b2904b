"""How a connection begins: who speaks first, and what. No byte is taken."""

from __future__ import annotations

import asyncio
import socket
from typing import Final, Literal

from hiverd.egress.first_bytes import Kind, classify
from hiverd.egress.peek import Peeker

FIRST_BYTES_SECONDS: Final = 20.0
"""For the whole of a ClientHello, or enough of a request to tell that it is one."""
IDLE_SECONDS: Final = 75.0
"""Of a connection on which nobody has said anything, as between two requests."""
SILENCE_SECONDS: Final = 0.3
"""After which a silent client may be one of a protocol in which the server speaks first."""


async def opening(peeker: Peeker) -> Kind | Literal["silent"] | None:
    """What the agent begins with; `silent` if it does not; None if it closed without a word. Raises `OSError`."""
    try:
        async with asyncio.timeout(SILENCE_SECONDS):
            more = await peeker.more()
    except TimeoutError:
        return "silent"
    return await first_kind(peeker) if more else None


async def first_kind(peeker: Peeker) -> Kind | None:
    """The same for an agent that has begun, or must. What stays undecided for too long, or cannot be seen, is refused:
    the next bytes could make a request of it."""
    try:
        async with asyncio.timeout(FIRST_BYTES_SECONDS):
            while (kind := classify(peeker.data)) is None:
                if not await peeker.more():
                    if peeker.blocked:
                        return "refused"
                    return "opaque" if peeker.data else None
    except TimeoutError:
        return "refused"
    return kind


async def upstream_speaks_first(peeker: Peeker, upstream: socket.socket) -> bool | None:
    """Waits for either side's first byte, or its end; None if neither says anything for too long. `upstream` has no
    transport. Raises `OSError`."""
    agent = asyncio.ensure_future(peeker.more())
    other = asyncio.ensure_future(Peeker(upstream).more())
    try:
        done, _ = await asyncio.wait((agent, other), timeout=IDLE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            return None
        # Both at once: the agent did not wait for a greeting, so its bytes are looked at.
        return not agent.done()
    finally:
        for task in (agent, other):
            task.cancel()
        await asyncio.gather(agent, other, return_exceptions=True)
