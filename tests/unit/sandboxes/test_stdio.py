"""Output as events: one per line, bytes kept, nothing left out in silence."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hiverd.sandboxes.stdio import LINE_MAX_BYTES, StdioLimits, StdioRecorder
from hiverd.wire.events import Event, StdioEvent


class Sink:
    def __init__(self) -> None:
        self.events: list[StdioEvent] = []
        self.open = True

    def wants(self, event_type: type[Event]) -> bool:
        return self.open

    def emit(self, event: Event) -> int:
        assert isinstance(event, StdioEvent)
        self.events.append(event)
        return len(self.events)


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now


def recorder(lines: int = 10**6, size: int = 10**9) -> tuple[StdioRecorder, Sink, Clock]:
    sink, clock = Sink(), Clock()
    return StdioRecorder(sink, StdioLimits(lines_per_second=lines, bytes_per_second=size), clock), sink, clock


@given(st.lists(st.binary(max_size=40)))
def test_cut_anywhere_the_text_is_the_same(pieces):
    made, sink, _ = recorder()
    for piece in pieces:
        made.feed("stdout", piece)
    made.finish()
    whole = b"".join(pieces)
    assert "".join(event.stdout or "" for event in sink.events) == "".join(
        line.decode("utf-8", "replace") for line in _lines(whole)
    )
    assert all((event.stdout or "").count("\n") <= 1 for event in sink.events)


def _lines(whole: bytes) -> list[bytes]:
    lines = [line + b"\n" for line in whole.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return [line for line in lines if line]


def test_streams_do_not_mix():
    made, sink, _ = recorder()
    made.feed("stdout", b"o1")
    made.feed("stderr", b"e1\n")
    assert made.has_partial_line
    made.feed("stdout", b"o2\r\n")
    assert not made.has_partial_line
    assert sink.events == [StdioEvent(stderr="e1\n"), StdioEvent(stdout="o1o2\r\n")]


def test_a_long_line_comes_in_pieces():
    made, sink, _ = recorder()
    made.feed("stdout", b"x" * (3 * LINE_MAX_BYTES + 5) + b"\n")
    assert max(len(event.stdout or "") for event in sink.events) == LINE_MAX_BYTES
    assert "".join(event.stdout or "" for event in sink.events) == "x" * (3 * LINE_MAX_BYTES + 5) + "\n"


def test_what_is_too_fast_is_counted():
    made, sink, clock = recorder(lines=3)
    made.feed("stdout", b"a\nb\nc\nd\ne\n")
    made.feed("stdout", b"f\n")
    clock.now = 2.0
    made.feed("stdout", b"g\n")
    assert [event.stdout or event.stderr for event in sink.events] == [
        "a\n",
        "b\n",
        "c\n",
        "[6 bytes in 3 lines not recorded: too fast]\n",
        "g\n",
    ]


def test_the_end_tells_what_was_left_out():
    made, sink, _ = recorder(size=4)
    made.feed("stdout", b"abc\ndef\nrest")
    made.finish()
    assert sink.events[-1].stderr == "[8 bytes in 1 lines not recorded: too fast]\n"


def test_an_excluded_type_costs_nothing():
    made, sink, _ = recorder()
    sink.open = False
    made.feed("stdout", b"x\ny")
    made.finish()
    assert sink.events == []
