"""Which access a path of a mount has (PROTOCOL 6.1, 6.2, 0.14). Pure; compiled once per change of the rules.

A pattern is an exact path, `P/**` for P and all below it, or holds `*`, `?` and `**` anywhere, compared segment by
segment. Of the patterns that match, the one with the longest literal text before its first wildcard decides, of equal
ones the earlier. The `/` before a closing `**` does not count, so that `P` and `P/**` are equally long. Nothing
matches: deny. No rules at all: everything `rw`.

A pattern that does not lie below the mount, as it is written, is read relative to the mount: with the mount `/data`,
`/data/a` and `/a` mean the same.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from msgspec import Struct

from hiverd.globs import ANY_SEGMENTS, matches_file_name, matches_segments
from hiverd.wire.model import AclAccess, AclRule

Access = AclAccess

MAX_REMEMBERED_PATHS: Final = 4096
"""Decisions that are kept; a sandbox can invent any number of paths."""
_WILDCARDS: Final = "*?"


class _Rank(Struct, frozen=True, order=True):
    """What decides between two patterns that match: the smaller one wins."""

    shortness: int
    index: int
    access: Access


class _Glob(Struct, frozen=True, eq=False):
    rank: _Rank
    segments: tuple[str, ...]


class _Globs:
    """The patterns that share one literal folder, found by how the name of a path ends."""

    def __init__(self) -> None:
        self._by_tail: dict[str, list[_Glob]] = {}
        self._tail_sizes: tuple[int, ...] = ()

    def add(self, glob: _Glob) -> None:
        last = glob.segments[-1]
        tail = "" if last == ANY_SEGMENTS else last[max(last.rfind(wildcard) for wildcard in _WILDCARDS) + 1 :]
        self._by_tail.setdefault(tail, []).append(glob)
        self._by_tail[tail].sort(key=lambda item: item.rank)
        self._tail_sizes = tuple(sorted({len(tail) for tail in self._by_tail}))

    def best(self, segments: Sequence[str], best: _Rank | None) -> _Rank | None:
        name = segments[-1] if segments else ""
        for size in self._tail_sizes:
            if size > len(name):
                break
            for glob in self._by_tail.get(name[len(name) - size :], ()):
                if best is not None and best < glob.rank:
                    break
                if matches_segments(glob.segments, segments, matches_file_name):
                    best = glob.rank
                    break
        return best


class Rules:
    """The compiled rules of one mount.

    `rules` as configured, `mount` the absolute path of the mount inside the sandbox. With `case_sensitive` false, names
    that a store takes for the same (case and Unicode form, here NFC and casefold) are the same for the rules too.
    """

    def __init__(self, rules: Iterable[AclRule], mount: str, *, case_sensitive: bool = True) -> None:
        self.case_sensitive = case_sensitive
        self._exact: dict[str, _Rank] = {}
        self._trees: dict[str, _Rank] = {}
        self._globs: dict[str, _Globs] = {}
        self._withholding: list[tuple[str, bool]] = []
        self._remembered: dict[str, Access] = {}
        own = tuple(rules) or (AclRule(path="/**", access="rw"),)
        for index, rule in enumerate(own):
            self._add(index, self._fold(relative_to_mount(rule.path, mount)), rule.access)
        self.fully_open: Final = all(rule.access == "rw" for rule in own) and "" in self._trees
        """True if nothing is withheld: every rule is `rw` and one covers the whole mount."""

    def access(self, path: str) -> Access:
        """What `path` (absolute relative to the mount, `/` is the mount itself) may be used for.

        A denied folder hides all below it, whatever rules lie deeper.
        """
        known = self._remembered.get(path)
        if known is None:
            known = self._access(path)
            if len(self._remembered) >= MAX_REMEMBERED_PATHS:
                self._remembered.clear()
            self._remembered[path] = known
        return known

    def own_access(self, path: str) -> Access:
        """As `access`, for a caller who knows that no folder above `path` is denied. Not remembered."""
        folded = self._fold(path).rstrip("/")
        segments = folded.split("/")[1:]
        best = self._exact.get(folded)
        for folder in _folders(folded, segments):
            tree = self._trees.get(folder)
            if tree is not None and (best is None or tree < best):
                best = tree
            globs = self._globs.get(folder)
            if globs is not None:
                best = globs.best(segments, best)
        return "deny" if best is None else best.access

    def withholds_below(self, path: str) -> bool:
        """False only if everything that is or could be below `path` is `rw`, provided that `path` itself is."""
        folded = self._fold(path).rstrip("/")
        if not any(_may_meet(folded, literal, spreads) for literal, spreads in self._withholding):
            # Without a rule of its own each name below has the rule that reaches it from here.
            return not any(folder in self._trees for folder in _folders(folded, folded.split("/")[1:]))
        return True

    def _add(self, index: int, pattern: str, access: Access) -> None:
        segments = pattern.split("/")[1:] if pattern else []
        wild = next((at for at, segment in enumerate(segments) if _is_wild(segment)), None)
        if wild is None:
            self._keep(self._exact, pattern, _Rank(-len(pattern), index, access))
        elif segments[wild:] == [ANY_SEGMENTS]:
            folder = pattern.removesuffix("/" + ANY_SEGMENTS)
            self._keep(self._trees, folder, _Rank(-len(folder), index, access))
        else:
            literal = pattern[: min(at for at in map(pattern.find, _WILDCARDS) if at >= 0)]
            folder = literal[: literal.rfind("/")]
            glob = _Glob(_Rank(-len(literal), index, access), tuple(segments))
            self._globs.setdefault(folder, _Globs()).add(glob)
        if access != "rw":
            literal = "/".join(["", *segments[:wild]])
            self._withholding.append((literal, wild is not None))

    @staticmethod
    def _keep(into: dict[str, _Rank], key: str, rank: _Rank) -> None:
        # The same pattern twice: the earlier one counts.
        into.setdefault(key, rank)

    def _access(self, path: str) -> Access:
        if path not in {"/", ""} and self.access(path[: path.rfind("/")] or "/") == "deny":
            return "deny"
        return self.own_access(path)

    def _fold(self, path: str) -> str:
        if self.case_sensitive:
            return path
        return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def relative_to_mount(pattern: str, mount: str) -> str:
    """A configured pattern as `/...` relative to the mount, without a closing `/`; empty for the mount itself."""
    clean = "".join(f"/{segment}" for segment in pattern.split("/") if segment not in {"", "."})
    root = "".join(f"/{segment}" for segment in mount.split("/") if segment not in {"", "."})
    if clean == root:
        return ""
    return clean.removeprefix(root) if clean.startswith(root + "/") else clean


def _is_wild(segment: str) -> bool:
    return any(wildcard in segment for wildcard in _WILDCARDS)


def _folders(path: str, segments: Sequence[str]) -> Iterator[str]:
    """`path` and what is above it, the mount (empty) first."""
    yield ""
    end = 0
    for segment in segments:
        end += len(segment) + 1
        yield path[:end]


def _may_meet(folder: str, literal: str, spreads: bool) -> bool:
    """True if a pattern with this literal start (and wildcards after it, if it spreads) may match below `folder`."""
    return literal.startswith(folder + "/") or (spreads and (folder == literal or folder.startswith(literal + "/")))
