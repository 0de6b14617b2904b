"""Patterns of hosts, URL paths and file names (PROTOCOL 5.1, 0.14). No pattern makes a hostile name expensive: matching
is linear in the text, or with `?` at worst in the product of both lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


def matches_file_name(pattern: str, text: str) -> bool:
    """As `matches_glob`, and `?` stands for one character."""
    if "?" not in pattern:
        return matches_glob(pattern, text)
    at = position = 0
    star, retry = -1, 0
    while position < len(text):
        if at < len(pattern) and pattern[at] == "*":
            star, retry = at, position
            at += 1
        elif at < len(pattern) and pattern[at] in ("?", text[position]):
            at += 1
            position += 1
        elif star >= 0:
            # The last `*` takes one character more; earlier ones need not be tried again.
            retry += 1
            at, position = star + 1, retry
        else:
            return False
    return not pattern[at:].strip("*")


def matches_segments(
    pattern: Sequence[str], segments: Sequence[str], matches: Callable[[str, str], bool] = matches_glob
) -> bool:
    """Compares segment by segment; `**` stands for zero or more segments.

    As with `*` in a glob, the leftmost match of each run between two `**` is enough.
    """
    first, *rest = _runs(pattern)
    if not rest:
        return len(first) == len(segments) and _run_matches(first, segments, 0, matches)
    *middle, last = rest
    end = len(segments) - len(last)
    if len(first) > end or not (
        _run_matches(first, segments, 0, matches) and _run_matches(last, segments, end, matches)
    ):
        return False
    position = len(first)
    for run in middle:
        while not (position + len(run) <= end and _run_matches(run, segments, position, matches)):
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


def _run_matches(run: Sequence[str], segments: Sequence[str], start: int, matches: Callable[[str, str], bool]) -> bool:
    return all(matches(glob, segments[start + index]) for index, glob in enumerate(run))
