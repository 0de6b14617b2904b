"""The name under which ours is kept when the service has something else by now. Pure."""

from __future__ import annotations

from collections.abc import Container
from datetime import UTC, datetime
from typing import Final

NAME_BYTES: Final = 255


def conflict_name(name: str, wall_seconds: float, taken: Container[str]) -> str:
    """`notes.txt` becomes `notes (conflict 2026-11-24 16.30.12).txt`, in UTC; with a number if that is taken too.

    The name stays within 255 bytes: what is before the mark is cut.
    """
    stamp = datetime.fromtimestamp(wall_seconds, UTC).strftime("%Y-%m-%d %H.%M.%S")
    stem, suffix = _split(name)
    number = 1
    while True:
        mark = f" (conflict {stamp})" if number == 1 else f" (conflict {stamp} {number})"
        candidate = _cut(stem, NAME_BYTES - len(mark.encode()) - len(_bytes(suffix))) + mark + suffix
        if candidate not in taken:
            return candidate
        number += 1


def _split(name: str) -> tuple[str, str]:
    """Stem and suffix; a leading dot begins no suffix, and one that is long is none."""
    stem, dot, suffix = name.rpartition(".")
    if not stem.strip(".") or not dot or len(suffix) > 16:
        return name, ""
    return stem, dot + suffix


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _cut(stem: str, length: int) -> str:
    while len(_bytes(stem)) > length:
        stem = stem[:-1]
    return stem
