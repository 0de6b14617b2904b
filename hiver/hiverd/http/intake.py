"""Reading from an asyncio transport, with pressure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Intake:
    """Reading from a transport, stopped and started again.

    With TLS also beneath it: when the peer closes, uvloop drops what it holds undelivered. So it must not see that
    before all is delivered.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport) -> None:
        self.paused = False
        self._loop = loop
        self._transport = transport
        self._limit: Callable[..., None] | None = getattr(transport, "set_read_buffer_limits", None)

    def pause(self) -> None:
        if not self.paused and not self._transport.is_closing():
            self.paused = True
            self._transport.pause_reading()
            if self._limit is not None:
                self._limit(0)

    def resume(self) -> None:
        if self.paused:
            self.paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()  # which has TLS deliver in the next turn of the loop
                if self._limit is not None:
                    self._loop.call_soon(self._open)

    def _open(self) -> None:
        if not self.paused and self._limit is not None:
            self._limit()
