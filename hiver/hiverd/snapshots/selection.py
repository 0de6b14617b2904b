"""Which paths a capture or a restore is about (PROTOCOL 3.16). Pure functions of names, which are bytes without a
leading slash, as in the archive."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Final

from hiverd.globs import matches_file_name, matches_segments

UNTOUCHED: Final = (b"proc", b"sys", b"dev")
"""Folders that are never captured and never restored: the kernel's, and made anew for every sandbox."""
_SPECIAL: Final = frozenset("*?")


class Selection:
    """Built from `include` patterns: a folder with all that is below it, written `/a`, `/a/*` or `/a/**`; or a glob.

    Without a pattern everything is selected. `excluded`: names that are left out, with all that is below them.
    """

    def __init__(self, include: Iterable[str] = (), excluded: Iterable[str] = ()) -> None:
        patterns = [_stripped(pattern) for pattern in include]
        self._everything = not patterns or "" in patterns
        literal = [pattern for pattern in patterns if not _SPECIAL.intersection(pattern)]
        self._globs = [pattern.split("/") for pattern in patterns if _SPECIAL.intersection(pattern)]
        self._folders = _outermost([os.fsencode(pattern) for pattern in literal])
        self._excluded = frozenset((*UNTOUCHED, *(os.fsencode(name.strip("/")) for name in excluded)))

    @property
    def bases(self) -> list[bytes]:
        """Folders or files such that what is selected lies at or below one of them; `b""` is the root."""
        if self._everything:
            return [b""]
        return _outermost([*self._folders, *(_literal_part(glob) for glob in self._globs)])

    def is_excluded(self, name: bytes) -> bool:
        """Whether exactly this name is left out; what is below it is for the caller not to ask."""
        return name in self._excluded

    def takes(self, name: bytes) -> bool:
        """Whether a name is selected and not left out."""
        return not self.below_excluded(name) and self.selects(name)

    def below_excluded(self, name: bytes) -> bool:
        return any(parent in self._excluded for parent in _with_parents(name))

    def selects(self, name: bytes) -> bool:
        """Whether a name is selected, apart from what is left out."""
        if self._everything:
            return True
        if any(name == folder or name.startswith(folder + b"/") for folder in self._folders):
            return True
        return bool(self._globs) and self._by_glob(name)

    @property
    def is_plain(self) -> bool:
        """Whether all at and below each base is selected, so that `selects` need not be asked."""
        return not self._globs

    def _by_glob(self, name: bytes) -> bool:
        segments = os.fsdecode(name).split("/")
        return any(
            matches_segments(glob, segments[:length], matches_file_name)
            for glob in self._globs
            for length in range(1, len(segments) + 1)
        )


def _stripped(pattern: str) -> str:
    segments = [segment for segment in pattern.split("/") if segment not in {"", "."}]
    while segments and segments[-1] in {"*", "**"}:
        segments.pop()
    return "/".join(segments)


def _outermost(names: list[bytes]) -> list[bytes]:
    kept: list[bytes] = []
    for name in sorted(names):
        if not any(other in {name, b""} or name.startswith(other + b"/") for other in kept):
            kept.append(name)
    return kept


def _literal_part(glob: list[str]) -> bytes:
    literal = []
    for segment in glob:
        if _SPECIAL.intersection(segment):
            break
        literal.append(segment)
    return os.fsencode("/".join(literal))


def _with_parents(name: bytes) -> list[bytes]:
    parts = name.split(b"/")
    return [b"/".join(parts[:length]) for length in range(1, len(parts) + 1)]
