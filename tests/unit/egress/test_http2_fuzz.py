"""Any bytes and any frames of an agent: the connection ends or goes on, nothing else, and nothing is let through."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine
from functools import cache
from pathlib import Path
from typing import Any

from hpack import Encoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hiverd.egress.http2_frames import FRAME_BYTES, PREFACE, FloodError, FrameReader
from support.http2 import Rig, rig

ALLOWED = b"allowed.test"
HEADS = [
    [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"api.test"), (b":path", b"/")],
    [
        (b":method", b"POST"),
        (b":scheme", b"https"),
        (b":authority", ALLOWED),
        (b":path", b"/"),
        (b"content-length", b"3"),
    ],
    [(b":method", b"CONNECT"), (b":authority", b"api.test")],
    [(b":status", b"200")],
    [(b"x", b"y")],
]
BLOCKS = st.sampled_from([Encoder().encode(head, huffman=False) for head in HEADS]) | st.binary(max_size=40)
STREAMS = st.integers(0, 9) | st.sampled_from([2**31 - 1, 2**32 - 1])


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    kind = draw(st.integers(0, 12))
    payload = draw(BLOCKS if kind in (1, 5, 9) else st.binary(max_size=24) | st.sampled_from([b"\0" * 4, b"\0" * 8]))
    size = draw(st.sampled_from([len(payload)] * 9 + [len(payload) + 3]))
    flags = draw(st.sampled_from([0, 1, 4, 5, 8, 0x20, 0x25, 0xFF]))
    return size.to_bytes(3) + bytes((kind, flags)) + draw(STREAMS).to_bytes(4) + payload


@st.composite
def conversations(draw: st.DrawFn) -> bytes:
    """Mostly what a well-behaved peer sends, in any order."""
    sent = b""
    number = 1
    for _ in range(draw(st.integers(0, 25))):
        kind = draw(st.sampled_from(["head", "head", "head", "data", "reset", "window", "ping", "settings", "any"]))
        if kind == "head":
            block, flags = Encoder().encode(draw(st.sampled_from(HEADS))), draw(st.sampled_from([4, 5]))
            sent += len(block).to_bytes(3) + bytes((1, flags)) + number.to_bytes(4) + block
            number += 2
        elif kind == "any":
            sent += draw(frames())
        else:
            code, payload = {
                "data": (0, draw(st.binary(max_size=20))),
                "reset": (3, b"\0\0\0\x08"),
                "window": (8, draw(st.sampled_from([b"\0\0\0\1", b"\x7f\xff\xff\xff"]))),
                "ping": (6, b"12345678"),
                "settings": (4, draw(st.sampled_from([b"", b"\0\4\0\0\0\0", b"\0\1\0\0\0\0", b"\xaa\xaa\0\0\0\1"]))),
            }[kind]
            stream = 0 if kind in ("ping", "settings") else draw(st.integers(0, number // 2)) * 2 + 1
            sent += (
                len(payload).to_bytes(3) + bytes((code, draw(st.sampled_from([0, 1])))) + stream.to_bytes(4) + payload
            )
    return sent


async def _survives(data: list[bytes]) -> Rig:
    with tempfile.TemporaryDirectory() as folder:
        _warm(Path(folder))
        unexpected: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unexpected.append(context))
        rules = [{"access": "allow", "host": "allowed.test", "ports": [443]}]
        async with rig(rules, Path(folder)) as made:
            client = await made.connect(start=False)
            client.listen()
            for piece in data:
                await client.raw(piece)
            client.end()
            await client.until(lambda: client.closed, "the connection's end")
        task = made.tasks[0]
        assert task.done()
        assert task.exception() is None
        assert unexpected == []
        assert made.outlet.http2_streams == 0
        return made


@cache
def _pem() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        Rig([], Path(folder), {})
        return (Path(folder) / "authority" / "ca.pem").read_bytes()


def _warm(folder: Path) -> None:
    """Making an authority is what costs most."""
    (folder / "authority").mkdir()
    (folder / "authority" / "ca.pem").write_bytes(_pem())


def _run(work: Coroutine[Any, Any, Rig]) -> Rig:
    return asyncio.run(work)


QUIETLY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@QUIETLY
@given(st.lists(st.binary(max_size=200), max_size=5), st.booleans())
def test_any_bytes(data: list[bytes], begun: bool) -> None:
    made = _run(_survives([PREFACE, *data] if begun else data))
    assert not any(event.access == "allowed" for event in made.events("request"))


@QUIETLY
@given(st.lists(frames(), max_size=20).map(b"".join) | conversations())
def test_any_frames(sent: bytes) -> None:
    made = _run(_survives([PREFACE, sent]))
    # Every request names api.test (the SNI), which no rule allows, whatever else it names.
    assert not any(event.access == "allowed" for event in made.events("request"))


@given(st.lists(st.binary(max_size=300) | frames(), max_size=30))
def test_the_reader_loses_and_adds_nothing(pieces: list[bytes]) -> None:
    reader = FrameReader(server=False)
    out = b""
    sent = b""
    try:
        for piece in pieces:
            sent += piece
            for part in reader.feed(piece):
                if not isinstance(part, bytes):
                    return
                out += part
            assert reader.held_bytes <= FRAME_BYTES + 9 + len(piece)
    except FloodError:
        return
    assert sent.startswith(out)
    assert len(out) + reader.held_bytes == len(sent)
