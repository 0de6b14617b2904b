"""WebSocket messages as they come to be on record (PROTOCOL 7, RFC 6455)."""

from __future__ import annotations

import os
import time

import pytest

from hiverd.egress.websocket import MAX_SHOWN_BYTES, NOT_READ, Frames

TEXT, BINARY, CLOSE, PING, PONG, MORE = 1, 2, 8, 9, 10, 0


def frame(opcode: int, content: bytes = b"", *, final: bool = True, mask: bytes = b"", bits: int = 0) -> bytes:
    """A frame as RFC 6455 5.2 draws it."""
    first = (0x80 if final else 0) | bits | opcode
    masked = 0x80 if mask else 0
    if len(content) < 126:
        head = bytes((first, masked | len(content)))
    elif len(content) < 1 << 16:
        head = bytes((first, masked | 126)) + len(content).to_bytes(2)
    else:
        head = bytes((first, masked | 127)) + len(content).to_bytes(8)
    if mask:
        content = bytes(byte ^ mask[index % 4] for index, byte in enumerate(content))
    return head + mask + content


def told(data: bytes, step: int | None = None) -> list[str]:
    messages: list[str] = []
    frames = Frames(lambda text, label: messages.append(f"{label} {text}"), "up")
    for start in range(0, len(data), step or len(data)):
        frames.feed(data[start : start + (step or len(data))])
    return messages


@pytest.mark.parametrize("step", [1, 2, 3, 1000, None])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (frame(TEXT, "Grüße".encode()), ["up Grüße"]),
        (frame(TEXT, b"masked", mask=b"\x01\x02\x03\x04"), ["up masked"]),
        (frame(TEXT), ["up "]),
        (frame(TEXT, b"x" * 126) + frame(TEXT, b"y" * 125), [f"up {'x' * 126}", f"up {'y' * 125}"]),
        (frame(BINARY, b"\0" * 300, mask=b"abcd"), ["up [binary 300 bytes]"]),
        (frame(PING, b"p") + frame(PONG, mask=b"abcd"), ["up [ping]", "up [pong]"]),
        (frame(CLOSE), ["up [close 1005]"]),
        (frame(CLOSE, b"\x03\xe8"), ["up [close 1000]"]),
        (frame(CLOSE, b"\x03\xe9going", mask=b"zzzz"), ["up [close 1001 going]"]),
        (
            frame(TEXT, b"a", final=False) + frame(PING) + frame(MORE, b"b", final=False) + frame(MORE, b"c"),
            ["up [ping]", "up abc"],
        ),
        (frame(BINARY, b"a", final=False) + frame(MORE, b"b") + frame(TEXT, b"t"), ["up [binary 2 bytes]", "up t"]),
    ],
)
def test_messages(data: bytes, expected: list[str], step: int | None) -> None:
    assert told(data, step) == expected


@pytest.mark.parametrize("pieces", [1, 3])
def test_large_messages_are_told_by_their_size(pieces: int) -> None:
    def message(size: int) -> bytes:
        part = size // pieces
        parts = [b"x" * part] * (pieces - 1) + [b"x" * (size - part * (pieces - 1))]
        return b"".join(
            frame(TEXT if index == 0 else MORE, content, final=index == pieces - 1, mask=b"abcd")
            for index, content in enumerate(parts)
        )

    assert told(message(MAX_SHOWN_BYTES), 4096) == ["up " + "x" * MAX_SHOWN_BYTES]
    assert told(message(MAX_SHOWN_BYTES + 1), 4096) == [f"up [text {MAX_SHOWN_BYTES + 1} bytes]"]


@pytest.mark.parametrize("data", [frame(TEXT, b"deflated", bits=0x40), frame(3, b"x"), frame(11)])
def test_what_is_not_readable_is_told_once(data: bytes) -> None:
    assert told(frame(TEXT, b"a") + data + frame(TEXT, b"b") + os.urandom(1000)) == ["up a", f"up {NOT_READ}"]


def test_a_flood_of_tiny_frames_is_read_in_time_that_grows_with_its_size() -> None:
    flood = frame(PING) * 100_000
    began = time.process_time()
    assert len(told(flood, 65536)) == 100_000
    assert time.process_time() - began < 2.0


def test_a_huge_frame_holds_no_memory() -> None:
    frames = Frames(lambda *_: None, "down")
    frames.feed(bytes((0x82, 127)) + (1 << 40).to_bytes(8))
    for _ in range(100):
        frames.feed(b"x" * 65536)
    assert len(frames._payload) <= MAX_SHOWN_BYTES + 1
