"""Host and path patterns (PROTOCOL 5.1). Matching is linear in the text: a pattern never makes a name expensive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

ANY_SEGMENTS: Final = "**"


def matches_glob(pattern: str, text: str) -> bool:
    """`*` stands for any run of characters; nothing else is special.

    Taking the leftmost place for each literal piece is enough, as only the last one has to be at the end.
    """
    first, *rest = pattern.split("*")
    if not rest:
        return first == text
    *middle, last = rest
    if len(text) < len(first) + len(last) or not text.startswith(first) or not text.endswith(last):
        return False
    position, end = len(first), len(text) - len(last)
    for piece in middle:
        position = text.find(piece, position, end)
        if position < 0:
            return False
        position += len(piece)
    return True


def matches_segments(pattern: Sequence[str], segments: Sequence[str]) -> bool:
    """Compares segment by segment; `**` stands for zero or more segments.

    As with `*` in a glob, the leftmost match of each run between two `**` is enough.
    """
    first, *rest = _runs(pattern)
    if not rest:
        return len(first) == len(segments) and _run_matches(first, segments, 0)
    *middle, last = rest
    end = len(segments) - len(last)
    if len(first) > end or not _run_matches(first, segments, 0) or not _run_matches(last, segments, end):
        return False
    position = len(first)
    for run in middle:
        while not (position + len(run) <= end and _run_matches(run, segments, position)):
            position += 1
            if position > end:
                return False
        position += len(run)
    return True


def _runs(pattern: Sequence[str]) -> Iterator[list[str]]:
    """The pieces between the `**` of a pattern."""
    run: list[str] = []
    for segment in pattern:
        if segment == ANY_SEGMENTS:
            yield run
            run = []
        else:
            run.append(segment)
    yield run


def _run_matches(run: Sequence[str], segments: Sequence[str], start: int) -> bool:
    return all(matches_glob(glob, segments[start + index]) for index, glob in enumerate(run))
