"""Which bodies are put on record, and their text (PROTOCOL 5.9)."""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Iterator
from typing import Final

from hiverd.http.framing import Headers

_TEXT_SUBTYPES: Final = frozenset(
    (
        "json",
        "xml",
        "javascript",
        "x-javascript",
        "ecmascript",
        "x-www-form-urlencoded",
        "x-ndjson",
        "ndjson",
        "jsonl",
        "json-seq",
        "event-stream",
    )
)
_CODINGS: Final = {b"gzip": zlib.MAX_WBITS | 32, b"x-gzip": zlib.MAX_WBITS | 32, b"deflate": zlib.MAX_WBITS | 32}
MAX_RATIO: Final = 100
"""Text out per byte in, beyond the first `FREE_BYTES`, after which a compressed body is not read any further."""
FREE_BYTES: Final = 1 << 20
NOT_READ: Final = "[compressed text, cut short here]"


def is_text(headers: Headers) -> bool:
    """Whether a body with these headers is recorded: uncompressed, and of a text type or of none (PROTOCOL 5.9)."""
    kind, coding = _described(headers)
    return coding == b"" and _is_text_type(kind)


def text_reader(headers: Headers) -> TextReader | None:
    """What reads a body with these headers as text, decompressing it where that is needed; None if it has no text, or
    in a coding that cannot be read (br, zstd)."""
    kind, coding = _described(headers)
    if not _is_text_type(kind) or (coding and coding not in _CODINGS):
        return None
    return TextReader(_CODINGS.get(coding))


class TextReader:
    """Text of one body from its bytes, in pieces of bounded size."""

    def __init__(self, window_bits: int | None) -> None:
        """`window_bits`: as for zlib; None if the body is not compressed."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._inflater = None if window_bits is None else zlib.decompressobj(window_bits)
        self._taken = 0
        self._given = 0
        self._broken = False

    def feed(self, data: bytes, piece_bytes: int) -> Iterator[str]:
        """The text in the next bytes, each piece from at most `piece_bytes` of it."""
        for piece in self._plain(data, piece_bytes):
            if text := self._decoder.decode(piece):
                yield text
        if self._broken and self._inflater is not None:
            self._inflater = None
            yield NOT_READ

    def end(self) -> str:
        """What an unfinished character at the end is shown as."""
        return self._decoder.decode(b"", final=True)

    def _plain(self, data: bytes, piece_bytes: int) -> Iterator[bytes]:
        if self._broken:
            return
        if self._inflater is None:
            for start in range(0, len(data), piece_bytes):
                yield data[start : start + piece_bytes]
            return
        yield from self._inflated(self._inflater, data, piece_bytes)

    def _inflated(self, inflater: zlib._Decompress, data: bytes, piece_bytes: int) -> Iterator[bytes]:
        if not self._taken and data and data[0] & 0x0F != 8 and data[:1] != b"\x1f":
            inflater = self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)  # deflate as some servers take it
        self._taken += len(data)
        while data and not inflater.eof:
            if self._given > FREE_BYTES + MAX_RATIO * self._taken:
                self._broken = True
                return
            try:
                piece = inflater.decompress(data, piece_bytes)
            except zlib.error:
                self._broken = True
                return
            self._given += len(piece)
            data = inflater.unconsumed_tail
            if piece:
                yield piece


def _described(headers: Headers) -> tuple[str, bytes]:
    """Content type, empty if there is none; content coding, empty if there is none, all of them if several."""
    kind, codings = b"", []
    for name, value in headers:
        if name == b"content-type":
            kind = value
        elif name == b"content-encoding" and (coding := value.strip().lower()) not in (b"", b"identity"):
            codings.append(coding)
    return kind.decode("latin-1"), b",".join(codings)


def _is_text_type(content_type: str) -> bool:
    kind, _, subtype = content_type.partition(";")[0].strip().lower().partition("/")
    return kind in ("", "text") or subtype in _TEXT_SUBTYPES or subtype.endswith(("+json", "+xml"))
