# ruff: noqa: S101 -- a test suite
"""Conformance of an entrypoint's terminal (PROTOCOL 3.12)."""

from __future__ import annotations

import asyncio

from hiverd.contracts.isolation import Isolation, Terminal

from .isolation_harness import Harness, eventually, read_until, run
from .isolation_life import shell

_ECHO = 'stty -echo; test -t 0 && echo on $TERM $COLORTERM; while read line; do echo "got $line"; done; exit 4'


class TerminalSuite:
    """Uses the fixtures `harness` and `isolation` (started)."""

    async def test_conversation_and_scrollback(self, harness: Harness, isolation: Isolation) -> None:
        async with harness.sandbox(isolation, argv=shell(_ECHO), tty=True) as workload:
            terminal = _of(workload.terminal())
            await _seen(terminal, b"on xterm-256color truecolor")
            output = terminal.output()
            await terminal.write(b"first\n")
            await read_until(output, b"got first\r\n")
            await terminal.write(b"second\n")
            await read_until(output, b"got second\r\n")
            assert (await terminal.scrollback(16)).endswith(b"got second\r\n")
            assert len(await terminal.scrollback(16)) == 16
            assert b"got first" in await terminal.scrollback(65536)

    async def test_sandbox_outlives_the_entrypoint(self, harness: Harness, isolation: Isolation) -> None:
        async with harness.sandbox(isolation, argv=shell(_ECHO), tty=True) as workload:
            terminal = _of(workload.terminal())
            await _seen(terminal, b"on xterm")
            live = asyncio.create_task(_drain(terminal), name="viewer")
            await terminal.write(b"\x04")
            assert await asyncio.wait_for(terminal.wait(), 30) == 4
            await asyncio.wait_for(live, 30)
            assert (await run(workload, "echo alive")).stdout == b"alive\n"
            assert b"on xterm" in await terminal.scrollback(65536)

    async def test_resize(self, harness: Harness, isolation: Isolation) -> None:
        script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done"
        async with harness.sandbox(isolation, argv=shell(script), tty=True) as workload:
            terminal = _of(workload.terminal())
            await _seen(terminal, b"ready")
            output = terminal.output()
            await terminal.resize(31, 99)
            await read_until(output, b"31 99\r\n")
            await terminal.resize(31, 99)
            await read_until(output, b"31 99\r\n")

    async def test_terminal_survives_a_restart(self, harness: Harness) -> None:
        async with harness.started() as first:
            image = await first.resolve_image(harness.image, lambda _: None)
            spec = harness.spec(image, argv=shell(_ECHO), tty=True)
            workload = await first.create(spec)
            await workload.begin()
            terminal = _of(workload.terminal())
            await _seen(terminal, b"on xterm")
            await terminal.write(b"before\n")
            await _seen(terminal, b"got before")
            state = workload.state
            await workload.close()
        async with harness.started() as second:
            adopted = await second.adopt(spec, state)
            terminal = _of(adopted.terminal())
            assert b"got before" in await terminal.scrollback(65536)
            output = terminal.output()
            await terminal.write(b"after\n")
            await read_until(output, b"got after\r\n")
            await adopted.close()
            await second.destroy(spec.sandbox_id, state)

    async def test_missing_program_shows_on_the_terminal(self, harness: Harness, isolation: Isolation) -> None:
        async with harness.sandbox(isolation, argv=("no-such-program",), tty=True) as workload:
            terminal = _of(workload.terminal())
            assert await asyncio.wait_for(terminal.wait(), 30) == 127
            assert b"no-such-program" in await terminal.scrollback(65536)
            assert (await run(workload, "echo alive")).stdout == b"alive\n"

    async def test_stop_hangs_up(self, harness: Harness, isolation: Isolation) -> None:
        script = "trap 'echo bye > /tmp/said; exit 0' HUP; echo ready; while :; do sleep 0.05; done"
        async with harness.sandbox(isolation, argv=shell(script), tty=True) as workload:
            terminal = _of(workload.terminal())
            await _seen(terminal, b"ready")
            await asyncio.wait_for(workload.stop(30), 15)
            assert (await workload.wait()).exit_code >= 128


def _of(terminal: Terminal | None) -> Terminal:
    assert terminal is not None
    return terminal


async def _seen(terminal: Terminal, wanted: bytes) -> None:
    """Waits until the terminal has shown something, at any time since its beginning."""
    await eventually(lambda: terminal.scrollback(65536), lambda shown: wanted in shown)


async def _drain(terminal: Terminal) -> None:
    async for _ in terminal.output():
        pass
