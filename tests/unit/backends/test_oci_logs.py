"""conmon's log format: byte-faithful, resumable, across rotation."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from hiver_backends.linux import logs
from hiver_backends.linux.inotify import Inotify

TIME = "2026-01-02T03:04:05.{:09d}+00:00"


def record(number: int, stream: str, tag: str, data: bytes) -> bytes:
    return f"{TIME.format(number)} {stream} {tag} ".encode() + data + b"\n"


def written_as(stream: str, data: bytes, start: int = 0) -> bytes:
    """What conmon makes of one write: F for each whole line, P for a rest without a newline."""
    *lines, rest = data.split(b"\n")
    text = b"".join(record(start, stream, "F", line) for line in lines)
    return text + (record(start, stream, "P", rest) if rest else b"")


@given(st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), st.binary(min_size=1, max_size=40)), max_size=20))
def test_every_byte_comes_back(writes: list[tuple[str, bytes]]) -> None:
    text = b"".join(written_as(stream, data, number) for number, (stream, data) in enumerate(writes))
    records, end = logs.parse(text)
    assert end == len(text)
    for wanted in ("stdout", "stderr"):
        assert b"".join(r.data for r in records if r.stream == wanted) == b"".join(d for s, d in writes if s == wanted)
    assert all(one.stream != two.stream for one, two in itertools.pairwise(records))


@given(st.data())
def test_a_cut_record_waits_for_its_rest(data: st.DataObject) -> None:
    text = written_as("stdout", b"one\r\ntwo") + written_as("stderr", b"three\n")
    cut = data.draw(st.integers(0, len(text)))
    records, end = logs.parse(text[:cut])
    more, rest = logs.parse(text[end:])
    assert end + rest == len(text)
    assert b"".join(r.data for r in [*records, *more] if r.stream == "stdout") == b"one\r\ntwo"


def test_records_that_are_none_are_skipped() -> None:
    text = b"garbage\n" + record(1, "stdin", "F", b"x") + record(2, "stdout", "F", b"kept")
    assert logs.parse(text) == ([logs.Record("stdout", b"kept\n", len(text))], len(text))


def test_position_resumes_in_the_middle(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(
        written_as("stdout", b"one\n", 1) + written_as("stderr", b"two\n", 2) + written_as("stdout", b"x\n", 3)
    )
    reader = logs.LogReader(log, None)
    chunks = reader.read()
    reader.close()
    assert [chunk.data for chunk in chunks] == [b"one\n", b"two\n", b"x\n"]
    again = logs.LogReader(log, chunks[0].position)
    assert [chunk.data for chunk in again.read()] == [b"two\n", b"x\n"]
    again.close()


def test_position_of_a_rotated_log_starts_at_the_new_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(written_as("stdout", b"old\n", 1))
    reader = logs.LogReader(log, None)
    position = reader.read()[-1].position
    reader.close()
    log.write_bytes(written_as("stdout", b"new\nnewer\n", 2))
    again = logs.LogReader(log, position)
    assert b"".join(chunk.data for chunk in again.read()) == b"new\nnewer\n"
    again.close()


def test_rotation_while_reading_loses_nothing(tmp_path: Path) -> None:
    log, fresh = tmp_path / "log", tmp_path / "fresh"
    log.write_bytes(written_as("stdout", b"one\n", 1))
    reader = logs.LogReader(log, None)
    seen = [chunk.data for chunk in reader.read()]
    with log.open("ab") as old:
        old.write(written_as("stdout", b"two\n", 2))
    fresh.write_bytes(written_as("stdout", b"three\n", 3))
    fresh.rename(log)
    while chunks := reader.read():
        seen += [chunk.data for chunk in chunks]
    reader.close()
    assert seen == [b"one\n", b"two\n", b"three\n"]


def test_a_line_longer_than_the_read_size(tmp_path: Path) -> None:
    log = tmp_path / "log"
    data = b"x" * 1_000_000
    log.write_bytes(record(1, "stdout", "F", data))
    reader = logs.LogReader(log, None)
    assert b"".join(chunk.data for chunk in reader.read()) == data + b"\n"
    reader.close()


def test_tail(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"".join(written_as("stdout", b"line %d\n" % number, number) for number in range(5000)))
    newest, position = logs.tail_bytes(log, 20)
    assert newest == b"e 4998\nline 4999\n"[-20:] or newest.endswith(b"line 4998\nline 4999\n")
    assert len(newest) == 20
    reader = logs.LogReader(log, position)
    assert reader.read() == []
    reader.close()
    assert logs.tail_bytes(log, 0)[0] == b""
    assert logs.tail_bytes(tmp_path / "none", 10)[0] == b""


async def test_follow_wakes_on_every_write(tmp_path: Path) -> None:
    log = tmp_path / "log"
    inotify = Inotify()
    ended = False
    stream = logs.follow(log, None, inotify, lambda: ended)
    for number in range(20):
        with log.open("ab") as file:
            file.write(written_as("stdout", b"%d\n" % number, number))
        chunk = await asyncio.wait_for(anext(stream), 5)
        assert chunk.data == b"%d\n" % number
    ended = True
    (tmp_path / "exit").write_text("0")
    assert [chunk async for chunk in stream] == []
    inotify.close()
