"""What viewers of one terminal see."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from hiverd.contracts.isolation import Terminal
from hiverd.sandboxes.terminals import SCROLLBACK_BYTES, VIEWER_QUEUE_PIECES, TerminalHub


class ScriptedTerminal(Terminal):
    """Output comes when the test says; `output` starts where the last `scrollback` ended, as the plug-ins do."""

    def __init__(self) -> None:
        self.shown = b""
        self.ended = asyncio.Event()
        self.scrollback_gate = asyncio.Event()
        self.scrollback_gate.set()
        self.readers = 0
        self._grown = asyncio.Condition()
        self._position = 0

    async def show(self, data: bytes) -> None:
        async with self._grown:
            self.shown += data
            self._grown.notify_all()

    async def scrollback(self, max_bytes: int) -> bytes:
        self._position = len(self.shown)
        newest = self.shown[-max_bytes:]
        await self.scrollback_gate.wait()
        return newest

    async def output(self) -> AsyncIterator[bytes]:
        self.readers += 1
        position = self._position
        try:
            while True:
                async with self._grown:
                    while len(self.shown) == position:
                        await self._grown.wait()
                    piece, position = self.shown[position:], len(self.shown)
                yield piece
        finally:
            self.readers -= 1

    async def write(self, data: bytes) -> None:
        await self.show(data)

    async def resize(self, rows: int, cols: int) -> None:
        raise NotImplementedError

    async def wait(self) -> int:
        await self.ended.wait()
        return 0


class Viewer:
    """Collects what one viewer gets."""

    def __init__(self, hub: TerminalHub) -> None:
        self.seen = b""
        self.changed = asyncio.Event()
        self.task = asyncio.create_task(self._run(hub), name="viewer")

    async def _run(self, hub: TerminalHub) -> None:
        async for piece in hub.view():
            self.seen += piece
            self.changed.set()

    async def until(self, text: bytes) -> None:
        async with asyncio.timeout(5):
            while not self.seen.endswith(text):
                self.changed.clear()
                await self.changed.wait()

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.wait((self.task,))


async def test_each_viewer_sees_one_sequence_whenever_it_comes() -> None:
    terminal = ScriptedTerminal()
    hub = TerminalHub(terminal)
    await terminal.show(b"1")
    viewers = []
    for number in range(2, 8):
        viewers.append(Viewer(hub))
        await asyncio.sleep(0)  # the newcomer is anywhere between its first step and its first piece
        await terminal.show(b"%d" % number)
    for viewer in viewers:
        await viewer.until(b"7")
        assert viewer.seen == b"1234567"
    assert terminal.readers == 1
    for viewer in viewers:
        await viewer.leave()


async def test_output_during_the_first_look_is_neither_lost_nor_doubled() -> None:
    terminal = ScriptedTerminal()
    hub = TerminalHub(terminal)
    await terminal.show(b"before ")
    terminal.scrollback_gate.clear()
    first, second = Viewer(hub), Viewer(hub)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await terminal.show(b"during ")
    terminal.scrollback_gate.set()
    await first.until(b"during ")
    await terminal.show(b"after")
    for viewer in (first, second):
        await viewer.until(b"after")
        assert viewer.seen == b"before during after"
        await viewer.leave()


async def test_after_all_have_left_a_new_viewer_starts_anew() -> None:
    terminal = ScriptedTerminal()
    hub = TerminalHub(terminal)
    viewer = Viewer(hub)
    await terminal.show(b"one ")
    await viewer.until(b"one ")
    await viewer.leave()
    await terminal.show(b"two ")
    viewer = Viewer(hub)
    await terminal.show(b"three")
    await viewer.until(b"three")
    assert viewer.seen == b"one two three"
    assert terminal.readers == 1
    await viewer.leave()


async def test_the_past_is_bounded_and_a_slow_viewer_loses_only_its_own() -> None:
    terminal = ScriptedTerminal()
    hub = TerminalHub(terminal)
    slow = hub.view()
    assert await anext(slow) == b""
    quick = Viewer(hub)
    piece = b"x" * 1023 + b"\n"
    count = VIEWER_QUEUE_PIECES + 50
    for number in range(count):
        await terminal.show(piece)
        async with asyncio.timeout(5):
            while len(quick.seen) < (number + 1) * len(piece):
                await asyncio.sleep(0)
    late = hub.view()
    assert await anext(late) == (piece * count)[-SCROLLBACK_BYTES:]
    await slow.aclose()
    await late.aclose()
    await quick.leave()


async def test_the_end_ends_all_viewers() -> None:
    terminal = ScriptedTerminal()
    hub = TerminalHub(terminal)
    viewer = Viewer(hub)
    await terminal.show(b"x")
    await viewer.until(b"x")
    await hub.close()
    await asyncio.wait_for(viewer.task, 5)
