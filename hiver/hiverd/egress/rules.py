"""The verdict on a connection or a request (PROTOCOL 5.1): a list of rules, compiled once per change. Pure.

The first rule that matches decides, and no match is a denial. So that a long list costs no more than a short one, the
rules that can apply to a host and port are picked once and remembered, the methods are a table, and the paths a tree of
their literal segments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from msgspec import Struct, field

from hiverd.egress.addresses import embedded_ipv4
from hiverd.egress.names import Address, HostError, canonical_host
from hiverd.egress.overrides import secrets_of
from hiverd.egress.targets import path_readings
from hiverd.globs import ANY_SEGMENTS, matches_glob, matches_segments
from hiverd.wire.model import EgressRule

_ABOUT_ADDRESSES: Final = re.compile(r"(?=.*[0-9:])[0-9a-f:.*]+")
MAX_REMEMBERED_TARGETS: Final = 1024
"""Hosts and ports whose rules are kept picked; a sandbox can invent any number of names."""


class Rule(Struct, frozen=True, eq=False):
    """One rule as it is compared. `index` is its place in the configuration."""

    index: int
    source: EgressRule
    host: str
    """Canonical, with `*` where any run of characters may stand."""
    ports: frozenset[int]
    methods: frozenset[str]
    paths: tuple[tuple[str, ...], ...]
    """Patterns as segments; empty: any path."""
    secrets: tuple[str, ...]
    """What its override puts in, and events must not tell."""

    @property
    def allows(self) -> bool:
        return self.source.access == "allow"

    @property
    def names_host(self) -> bool:
        """True if the host is written out. Only such a rule reaches guarded addresses (PROTOCOL 0.2)."""
        return "*" not in self.host

    @property
    def needs_requests(self) -> bool:
        """True if the rule can only be kept by reading requests, so bytes that are none must not pass under it."""
        return bool(self.methods or self.paths or self.source.override_script or self._changes_requests())

    def _changes_requests(self) -> bool:
        override = self.source.override
        return override is not None and bool(
            override.headers or override.query or override.prefix_path or override.body is not None
        )


class Verdict(Struct, frozen=True, eq=False):
    """`rule` is the one that decided; None: nothing matched."""

    rule: Rule | None = None

    @property
    def allowed(self) -> bool:
        return self.rule is not None and self.rule.allows


DENIED: Final = Verdict()


class Policy:
    """The compiled rules of one sandbox. Immutable in meaning; hosts are given in canonical form."""

    def __init__(self, rules: Iterable[EgressRule]) -> None:
        self.rules: Final = tuple(_compiled(index, rule) for index, rule in enumerate(rules))
        self._picker = _Picker(self.rules)
        self._address_rules = tuple(rule for rule in self.rules if _ABOUT_ADDRESSES.fullmatch(rule.host))
        self._targets: dict[tuple[str, int], _Target] = {}

    def judge_handshake(self, host: str, port: int) -> Verdict:
        """Before a TLS handshake, where no method and path are known: deny rules with paths do not count yet."""
        return self._target(host, port).handshake

    def judge_opaque(self, host: str, port: int) -> Verdict:
        """For bytes that are no requests: the first rule for the target must allow all of it."""
        return self._target(host, port).opaque

    def judge_request(self, host: str, port: int, method: str, path: str) -> Verdict:
        """`path` is raw, without the query. All its readings must be decided by one rule. Methods are compared without
        regard to case (PROTOCOL 5.1): `get` may be GET to an upstream."""
        target = self._target(host, port)
        method = method.upper()
        if not target.has_paths:
            return target.judge(method, "/")
        first, *others = [target.judge(method, reading) for reading in path_readings(path)]
        if any(other.rule is not first.rule for other in others):
            return DENIED
        return first

    def address_denials(self, rule: Rule) -> int:
        """How many rules `denies_address` looks at. What was dialled for one rule serves another with as many."""
        return sum(not other.allows and other.index < rule.index for other in self._address_rules)

    def denies_address(self, address: Address, port: int, *, before: Rule) -> bool:
        """Whether a deny rule about addresses, above the rule that let a name pass, covers what the name led to."""
        inner = embedded_ipv4(address)
        texts = (str(address),) if inner is None else (str(address), str(inner))
        return any(
            not rule.allows
            and not (rule.methods or rule.paths)
            and (not rule.ports or port in rule.ports)
            and any(matches_glob(rule.host, text) for text in texts)
            for rule in self._address_rules
            if rule.index < before.index
        )

    def _target(self, host: str, port: int) -> _Target:
        target = self._targets.get((host, port))
        if target is None:
            if len(self._targets) >= MAX_REMEMBERED_TARGETS:
                del self._targets[next(iter(self._targets))]
            target = self._targets[host, port] = _Target(
                [rule for rule in self._picker.pick(host) if not rule.ports or port in rule.ports]
            )
        return target


class _Picker:
    """Finds the rules whose host pattern matches, in their order."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._exact: dict[str, list[Rule]] = {}
        self._suffixes: dict[str, list[Rule]] = {}
        self._globs: list[Rule] = []
        for rule in rules:
            if rule.names_host:
                self._exact.setdefault(rule.host, []).append(rule)
            elif rule.host.startswith("*.") and "*" not in rule.host[1:]:
                self._suffixes.setdefault(rule.host[1:], []).append(rule)
            else:
                self._globs.append(rule)

    def pick(self, host: str) -> list[Rule]:
        found = [rule for rule in self._globs if matches_glob(rule.host, host)]
        found += self._exact.get(host, ())
        dot = host.find(".")
        while dot >= 0:
            found += self._suffixes.get(host[dot:], ())
            dot = host.find(".", dot + 1)
        return sorted(found, key=lambda rule: rule.index)


class _Node(Struct, eq=False):
    """A place in the tree of literal leading segments."""

    children: dict[str, _Node] = field(default_factory=dict)
    rules: list[tuple[Rule, tuple[str, ...]]] = field(default_factory=list)
    """In order, each with the part of its pattern that is left below this node."""


class _Target:
    """The rules of one host and port."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._any_method: Rule | None = None
        self._by_method: dict[str, Rule] = {}
        self._tree = _Node()
        self.has_paths = False
        for rule in rules:
            self._add(rule)
        self.handshake = Verdict(next((rule for rule in rules if rule.allows or not rule.paths), None))
        plain = rules[0] if rules else None
        self.opaque = DENIED if plain is not None and plain.allows and plain.needs_requests else Verdict(plain)

    def _add(self, rule: Rule) -> None:
        for pattern in rule.paths:
            self.has_paths = True
            self._plant(rule, pattern)
        if rule.paths or self._any_method is not None:
            return
        if not rule.methods:
            self._any_method = rule
        for method in rule.methods:
            self._by_method.setdefault(method, rule)

    def _plant(self, rule: Rule, pattern: tuple[str, ...]) -> None:
        node = self._tree
        for depth, segment in enumerate(pattern):
            if "*" in segment:
                node.rules.append((rule, pattern[depth:]))
                return
            node = node.children.setdefault(segment, _Node())
        node.rules.append((rule, ()))

    def judge(self, method: str, path: str) -> Verdict:
        best = self._by_method.get(method)
        if best is None or (self._any_method is not None and self._any_method.index < best.index):
            best = self._any_method
        if self.has_paths:
            best = self._best_by_path(best, method, path.split("/")[1:])
        return Verdict(best)

    def _best_by_path(self, best: Rule | None, method: str, segments: list[str]) -> Rule | None:
        for node, depth in _walk(self._tree, segments):
            for rule, pattern in node.rules:
                if best is not None and rule.index >= best.index:
                    break
                if rule.methods and method not in rule.methods:
                    continue
                if matches_segments(pattern, segments[depth:]):
                    best = rule
                    break
        return best


def _walk(node: _Node, segments: list[str]) -> Iterator[tuple[_Node, int]]:
    """The nodes along the segments, each with its depth."""
    yield node, 0
    for depth, segment in enumerate(segments, start=1):
        child = node.children.get(segment)
        if child is None:
            return
        node = child
        yield node, depth


def _compiled(index: int, rule: EgressRule) -> Rule:
    paths = (*(rule.paths or ()), *_tarball_paths(rule.paths or ()))
    return Rule(
        index=index,
        source=rule,
        host=_canonical_pattern(rule.host),
        ports=frozenset(rule.ports or ()),
        methods=frozenset(method.upper() for method in rule.methods or ()),
        paths=tuple(dict.fromkeys(_segments(path) for path in paths)),
        secrets=secrets_of(rule.override),
    )


def _canonical_pattern(pattern: str) -> str:
    """An invalid name stays as it is: it matches nothing that a sandbox can ask for."""
    pattern = pattern.strip().lower()
    if "*" in pattern:
        return pattern if pattern.strip("*") == "" else pattern.removesuffix(".")
    try:
        return canonical_host(pattern)
    except HostError:
        return pattern


def _segments(pattern: str) -> tuple[str, ...]:
    """`**` at the start may stand without its slash; runs of `**` are one."""
    segments = pattern.removeprefix("/").split("/")
    return tuple(
        segment
        for position, segment in enumerate(segments)
        if not (segment == ANY_SEGMENTS and position and segments[position - 1] == ANY_SEGMENTS)
    )


def _tarball_paths(paths: Sequence[str]) -> Iterator[str]:
    """What `allowed_npm_packages` means by `/P` and `/P/*` side by side (PROTOCOL 4.5).

    A registry serves a package's tarballs at `/P/-/FILE.tgz`, which `/P/*` does not cover. This layout has a meaning in
    registries only, so the pair reaches no other paths of other servers than these.
    """
    given = frozenset(paths)
    for path in paths:
        if "*" not in path and f"{path}/*" in given:
            yield f"{path}/-/*.tgz"
