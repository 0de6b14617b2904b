"""Names of files that a service does not take, mapped to ones that it does, and back. Pure.

A character that is not allowed becomes its neighbour in the private use area (U+F000 + its code, as the file systems of
Windows Subsystem for Linux and SMB clients do; bytes that are no UTF-8, U+F780 to U+F7FF). The mapping is one to one
in both directions, so no name of either side is unreachable: where such a neighbour, or our quote U+F8FE, is part of a
name already, quotes in front of it tell which of the two is meant.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import Final

QUOTE: Final = "\uf8fe"
UNDECODABLE: Final = "".join(map(chr, range(0xDC80, 0xDD00)))
"""Surrogates, as `os.fsdecode` makes them of bytes that are no UTF-8."""
CONTROLS: Final = "".join(map(chr, [*range(0x20), 0x7F]))


def _never(_: str) -> bool:
    return False


class Names:
    """A one-to-one mapping of all names to those without certain characters and words.

    `always`: characters that may be nowhere; `first` and `last`: not at the start, not at the end. `reserved`: names
    that are not allowed as a whole; they get a quote in front. `reserved_end`: the same at the end. `inside`: the
    halves of a word that may be nowhere, in upper or lower case; it gets a quote in the middle.
    """

    def __init__(
        self,
        always: str,
        *,
        first: str = "",
        last: str = "",
        reserved: Callable[[str], bool] = _never,
        reserved_end: Callable[[str], bool] = _never,
        inside: tuple[str, str] | None = None,
    ) -> None:
        self._always = frozenset(always)
        self._first = frozenset(first)
        self._last = frozenset(last)
        self._reserved = reserved
        self._reserved_end = reserved_end
        # The second half is only looked at: it may begin the next such word.
        pattern = f"{re.escape(inside[0])}{QUOTE}*(?={re.escape(inside[1])})" if inside else "(?!)"
        self._inside = re.compile(pattern, re.IGNORECASE)

    def encode(self, name: str) -> str:
        """Any name -> one that is allowed."""
        if self._reserved(name.lstrip(QUOTE)):
            name = QUOTE + name
        if self._reserved_end(name.rstrip(QUOTE)):
            name += QUOTE
        name = self._inside.sub(lambda found: found[0] + QUOTE, name)
        return self._map(name, self._encode_one)

    def decode(self, name: str) -> str:
        """The inverse of `encode`."""
        name = self._map(name, self._decode_one)
        name = self._inside.sub(lambda found: found[0].removesuffix(QUOTE), name)
        if name.endswith(QUOTE) and self._reserved_end(name.rstrip(QUOTE)):
            name = name[:-1]
        if name.startswith(QUOTE) and self._reserved(name.lstrip(QUOTE)):
            name = name[1:]
        return name

    def _map(self, name: str, one: Callable[[str, int, Callable[[str], bool]], str]) -> str:
        """Takes the name apart into characters, each with the quotes in front of it."""
        made: list[str] = []
        quotes = 0
        for index, char in enumerate(name):
            if char == QUOTE:
                quotes += 1
                continue
            at_start, at_end = index == quotes, index == len(name) - 1

            def refused(char: str, at_start: bool = at_start, at_end: bool = at_end) -> bool:
                at_edge = (at_start and char in self._first) or (at_end and char in self._last)
                return char in self._always or at_edge

            made.append(one(char, quotes, refused))
            quotes = 0
        return "".join(made) + QUOTE * quotes

    @staticmethod
    def _encode_one(char: str, quotes: int, refused: Callable[[str], bool]) -> str:
        if refused(char):
            return QUOTE * (2 * quotes) + _neighbour(char)
        original = _original(char)
        if original is not None and refused(original):
            return QUOTE * (2 * quotes + 1) + char
        return QUOTE * quotes + char

    @staticmethod
    def _decode_one(char: str, quotes: int, refused: Callable[[str], bool]) -> str:
        original = _original(char)
        if original is None or not refused(original):
            return QUOTE * quotes + char
        return QUOTE * (quotes // 2) + (char if quotes % 2 else original)


def _neighbour(char: str) -> str:
    code = ord(char)
    return chr(0xF700 + code - 0xDC00) if code >= 0xDC80 else chr(0xF000 + code)


def _original(char: str) -> str | None:
    code = ord(char)
    if 0xF000 <= code < 0xF080:
        return chr(code - 0xF000)
    if 0xF780 <= code < 0xF800:
        return chr(code - 0xF700 + 0xDC00)
    return None


def split(path: str) -> list[str]:
    """The names of a path of the contract. `OSError` EINVAL for one that is not clean: it could lead out."""
    if path == "/":
        return []
    start, *names = path.split("/")
    if start or not names or not all(names) or "." in names or ".." in names or "\0" in path:
        raise OSError(errno.EINVAL, "not a clean absolute path", path)
    return names
