"""The text of bodies for the record, decompressed within bounds (PROTOCOL 5.9)."""

from __future__ import annotations

import gzip
import zlib

import pytest

from hiverd.http.bodies import FREE_BYTES, MAX_RATIO, NOT_READ, is_text, text_reader
from hiverd.http.framing import Headers

TEXT = ("Grüße, " * 20_000).encode()


def raw_deflate(data: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return deflater.compress(data) + deflater.flush()


def read(headers: Headers, data: bytes, *, step: int = 999, piece: int = 1000) -> list[str]:
    reader = text_reader(headers)
    assert reader is not None
    pieces = [text for start in range(0, len(data), step) for text in reader.feed(data[start : start + step], piece)]
    return [*pieces, reader.end()]


@pytest.mark.parametrize("step", [1, 999, 1_000_000])
@pytest.mark.parametrize(
    ("coding", "data"),
    [
        (b"", TEXT),
        (b"identity", TEXT),
        (b"gzip", gzip.compress(TEXT)),
        (b"X-Gzip", gzip.compress(TEXT)),
        (b"deflate", zlib.compress(TEXT)),
        (b"deflate", raw_deflate(TEXT)),
    ],
    ids=["none", "identity", "gzip", "x-gzip", "deflate", "raw-deflate"],
)
def test_codings(coding: bytes, data: bytes, step: int) -> None:
    pieces = read([(b"content-encoding", coding), (b"content-type", b"text/plain")], data, step=step)
    assert "".join(pieces) == TEXT.decode()
    assert max(map(len, pieces)) <= 1000


@pytest.mark.parametrize("coding", [b"br", b"zstd", b"gzip, br"])
def test_what_is_not_read(coding: bytes) -> None:
    assert text_reader([(b"content-encoding", coding)]) is None
    assert text_reader([(b"content-type", b"image/png")]) is None


def test_only_plain_text_is_text_to_those_who_do_not_decompress() -> None:
    assert is_text([(b"content-type", b"text/plain")])
    assert not is_text([(b"content-type", b"text/plain"), (b"content-encoding", b"gzip")])


def test_a_bomb_is_cut_short_and_says_so() -> None:
    bomb = gzip.compress(bytes(200 * FREE_BYTES), 9)
    pieces = read([(b"content-encoding", b"gzip")], bomb, step=4096, piece=32768)
    assert pieces[-2:] == [NOT_READ, ""]
    assert sum(map(len, pieces)) < FREE_BYTES + MAX_RATIO * len(bomb) + 2 * 32768


def test_broken_data_is_cut_short_and_says_so() -> None:
    pieces = read([(b"content-encoding", b"gzip")], gzip.compress(b"fine" * 1000, 0)[:3000] + b"\xff" * 5000)
    assert pieces[-2] == NOT_READ
    assert "".join(pieces).startswith("finefine")


def test_characters_that_are_no_utf_8() -> None:
    assert "".join(read([], b"a\xffb\xc3", step=1)) == "a\ufffdb\ufffd"
