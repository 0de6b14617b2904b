"""Turns output bytes into `stdio` events: one per line, bounded in rate, never silent about what it leaves out."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from hiverd.clock import Clock
from hiverd.contracts.isolation import Stream
from hiverd.wire.events import EventSink, StdioEvent

LINE_MAX_BYTES: Final = 10 << 10
"""A longer line is recorded in pieces: escaped, a byte becomes six at most, and a line of the stream stays below 64 KiB
(PROTOCOL 2)."""
WINDOW_SECONDS: Final = 1.0


class StdioLimits(Struct, frozen=True):
    lines_per_second: int
    bytes_per_second: int


class StdioRecorder:
    """One per running command or entrypoint.

    A command that writes faster than the limits is not slowed down by the journal: what exceeds them within a second
    is counted, and one event in brackets says how much was not recorded. The caller of exec still gets every byte.
    """

    def __init__(self, sink: EventSink, limits: StdioLimits, clock: Clock) -> None:
        self._sink = sink
        self._limits = limits
        self._clock = clock
        self._partial: dict[Stream, bytes] = {"stdout": b"", "stderr": b""}
        self._window_start = clock.monotonic()
        self._lines = 0
        self._bytes = 0
        self._skipped_lines = 0
        self._skipped_bytes = 0

    def feed(self, stream: Stream, data: bytes) -> None:
        if not self._sink.wants(StdioEvent):
            return
        self._roll_window()
        if self._over_budget():
            self._skip(stream, data)
            return
        data = self._partial[stream] + data
        lines = data.splitlines(keepends=True) if b"\r" not in data else _split_lf(data)
        self._partial[stream] = b""
        if lines and not lines[-1].endswith(b"\n") and len(lines[-1]) < LINE_MAX_BYTES:
            self._partial[stream] = lines.pop()
        for position, line in enumerate(lines):
            if self._over_budget():
                self._skip(stream, b"".join(lines[position:]))
                return
            self._record(stream, line)

    @property
    def has_partial_line(self) -> bool:
        return any(self._partial.values())

    def finish(self) -> None:
        """Records unfinished lines and what was left out."""
        for stream in ("stdout", "stderr"):
            rest, self._partial[stream] = self._partial[stream], b""
            if rest and self._sink.wants(StdioEvent):
                self._record(stream, rest)
        self._report_skipped()

    def _record(self, stream: Stream, line: bytes) -> None:
        for start in range(0, len(line), LINE_MAX_BYTES):
            text = line[start : start + LINE_MAX_BYTES].decode("utf-8", "replace")
            self._sink.emit(StdioEvent(stdout=text) if stream == "stdout" else StdioEvent(stderr=text))
        self._lines += 1
        self._bytes += len(line)

    def _skip(self, stream: Stream, data: bytes) -> None:
        self._skipped_bytes += len(self._partial[stream]) + len(data)
        self._skipped_lines += data.count(b"\n")
        self._partial[stream] = b""

    def _over_budget(self) -> bool:
        return self._lines >= self._limits.lines_per_second or self._bytes >= self._limits.bytes_per_second

    def _roll_window(self) -> None:
        now = self._clock.monotonic()
        if now - self._window_start < WINDOW_SECONDS:
            return
        self._window_start = now
        self._report_skipped()
        self._lines = self._bytes = 0

    def _report_skipped(self) -> None:
        if not self._skipped_bytes:
            return
        self._sink.emit(
            StdioEvent(stderr=f"[{self._skipped_bytes} bytes in {self._skipped_lines} lines not recorded: too fast]\n")
        )
        self._skipped_bytes = self._skipped_lines = 0


def _split_lf(data: bytes) -> list[bytes]:
    """Lines end at LF only; bytes.splitlines would also end them at a lone CR, as a progress bar writes it."""
    pieces = data.split(b"\n")
    lines = [piece + b"\n" for piece in pieces[:-1]]
    return [*lines, pieces[-1]] if pieces[-1] else lines
