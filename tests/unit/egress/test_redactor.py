"""Secrets do not reach events, however their text is cut into pieces."""

from __future__ import annotations

import pytest

from hiverd.egress.redactor import Redactor

SECRETS = ("Bearer abababab", "abababab", "x" * 40_000)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 1000])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("say Bearer abababab twice abababab.", "say [redacted] twice [redacted]."),
        ("abababaBearer abababab", "abababa[redacted]"),
        ("ends with Bearer abab", "ends with Bearer abab"),
        ("ababababab", "[redacted]ab"),
        ("nothing", "nothing"),
        ("x" * 39_999, "x" * 39_999),
        ("y" + "x" * 40_001, "y[redacted]x"),
    ],
)
def test_pieces(text: str, expected: str, size: int) -> None:
    size = size if len(text) < 1000 else size * 1000
    redactor = Redactor(SECRETS)
    pieces = [redactor.piece(text[start : start + size]) for start in range(0, len(text), size)]
    assert "".join(pieces) + redactor.end() == expected


def test_what_cannot_be_a_secret_is_not_held_back() -> None:
    redactor = Redactor(SECRETS)
    assert redactor.piece("data: 1\n\n") == "data: 1\n\n"
    assert redactor.piece("a Bear") == "a "
    assert redactor.piece("s") == "Bears"


def test_whole_texts_leave_pieces_alone() -> None:
    redactor = Redactor(SECRETS)
    assert redactor.piece("Bearer ") == ""
    assert redactor.whole("abababab Bearer") == "[redacted] Bearer"
    assert redactor.end() == "Bearer "
