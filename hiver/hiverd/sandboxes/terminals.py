"""The entrypoint's terminal, shared by any number of viewers (PROTOCOL 3.12, attach)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Final

from hiverd.contracts.isolation import Terminal

log = logging.getLogger(__name__)

SCROLLBACK_BYTES: Final = 64 << 10
VIEWER_QUEUE_PIECES: Final = 256


class TerminalHub:
    """Fans one terminal out. It reads only while somebody watches; the plug-in keeps the scrollback."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._viewers: set[asyncio.Queue[bytes | None]] = set()
        self._pump: asyncio.Task[None] | None = None
        self._recent = bytearray()
        """While the pump runs: the newest output, up to the last piece that was published."""
        self._starting = asyncio.Lock()
        self._closed = False

    async def view(self) -> AsyncIterator[bytes]:
        """Scrollback, then live output until the entrypoint ends: one sequence without a gap or a repetition.

        A slow viewer loses data, never delays others.
        """
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(VIEWER_QUEUE_PIECES)
        async with self._starting:
            await self._ensure_pump()
            # In one step with the copy: what is published later comes through the queue, what was earlier is in it.
            scrollback = bytes(self._recent)
            self._viewers.add(queue)
        try:
            yield scrollback
            if self._closed:
                return
            while (piece := await queue.get()) is not None:
                yield piece
        finally:
            self._viewers.discard(queue)
            if not self._viewers and self._pump is not None:
                self._pump.cancel()
                self._pump = None

    async def _ensure_pump(self) -> None:
        if self._pump is not None and not self._pump.done():
            return
        self._recent = bytearray(await self._terminal.scrollback(SCROLLBACK_BYTES))
        if not self._closed:
            self._pump = asyncio.create_task(self._read(), name="terminal-hub")

    async def write(self, data: bytes, size: tuple[int, int] | None) -> None:
        if size is not None:
            await self._terminal.resize(*size)
        else:
            await self._terminal.write(data)

    async def close(self) -> None:
        """The sandbox ends: so do all viewers."""
        self._closed = True
        if self._pump is not None:
            self._pump.cancel()
        self._end_viewers()

    async def _read(self) -> None:
        try:
            async for piece in self._terminal.output():
                self._publish(piece)
            exit_code = await self._terminal.wait()
            self._publish(b"\r\n\x1b[2m[entrypoint exited with code %d]\x1b[0m\r\n" % exit_code)
            self._end_viewers()
        except Exception:
            log.exception("terminal: reading failed")
            self._end_viewers()

    def _publish(self, piece: bytes) -> None:
        self._recent += piece
        del self._recent[:-SCROLLBACK_BYTES]
        for queue in self._viewers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(piece)

    def _end_viewers(self) -> None:
        for queue in self._viewers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(None)
