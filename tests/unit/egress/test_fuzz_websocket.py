"""Frames are read along the way: whatever passes, reading ends, holds little, and tells which messages there were."""

from __future__ import annotations

import time
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hiverd.egress.websocket import MAX_SHOWN_BYTES, Frames


class Recorder:
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str, _label: str) -> None:
        self.messages.append(text)


def frames() -> tuple[Any, Recorder]:
    recorder = Recorder()
    return Frames(recorder.message, "up"), recorder


def frame(opcode: int, content: bytes, *, final: bool = True, mask: bytes = b"") -> bytes:
    size = len(content)
    length = (
        bytes((size,)) if size < 126 else b"\x7e" + size.to_bytes(2) if size < 65536 else b"\x7f" + size.to_bytes(8)
    )
    if mask:
        content = bytes(byte ^ mask[index % 4] for index, byte in enumerate(content))
        length = bytes((length[0] | 0x80,)) + length[1:] + mask
    return bytes((opcode | (0x80 if final else 0),)) + length + content


@given(st.binary(max_size=300), st.integers(1, 50))
def test_any_bytes_in_any_pieces(data: bytes, size: int) -> None:
    reader, _ = frames()
    for start in range(0, len(data), size):
        reader.feed(data[start : start + size])


@given(
    st.lists(st.tuples(st.text(max_size=200), st.sampled_from([b"", b"abcd", b"\0\xff\1\2"])), max_size=6),
    st.integers(1, 64),
)
def test_texts_are_told_whole_however_they_are_cut(messages: list[tuple[str, bytes]], size: int) -> None:
    data = b""
    for text, mask in messages:
        content = text.encode()
        half = len(content) // 2
        data += (
            frame(1, content[:half], final=False, mask=mask) + frame(9, b"ping") + frame(0, content[half:], mask=mask)
        )
    reader, recorder = frames()
    for start in range(0, len(data), size):
        reader.feed(data[start : start + size])
    assert recorder.messages == [shown for text, _ in messages for shown in ("[ping]", text)]


def test_a_large_message_is_a_marker_and_never_held() -> None:
    reader, recorder = frames()
    piece = bytes(60_000)
    for number in range(100):
        reader.feed(frame(1 if number == 0 else 0, piece, final=number == 99))
        held = len(reader._payload) + len(reader._message)
        assert held <= 3 * MAX_SHOWN_BYTES
    assert recorder.messages == ["[text 6000000 bytes]"]


def test_a_frame_without_end_is_not_held() -> None:
    reader, recorder = frames()
    reader.feed(b"\x81\x7f" + b"\x7f" + b"\xff" * 7)
    for _ in range(100):
        reader.feed(bytes(65_536))
        assert len(reader._payload) <= 2 * MAX_SHOWN_BYTES
    assert recorder.messages == []


def test_tiny_frames_take_linear_time() -> None:
    reader, _ = frames()
    began = time.process_time()
    reader.feed(frame(0x0A, b"") * 32_768)
    assert time.process_time() - began < 2
