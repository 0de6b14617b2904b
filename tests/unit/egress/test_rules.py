"""Verdicts, against the words of PROTOCOL 5.1 and against a plain reading of the list."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hiverd.egress.rules import MAX_REMEMBERED_TARGETS, Policy
from hiverd.egress.targets import path_readings
from hiverd.globs import matches_glob, matches_segments
from hiverd.wire.model import EgressOverride, EgressRule


def allow(host: str, **members: Any) -> EgressRule:
    return EgressRule(access="allow", host=host, **members)


def deny(host: str, **members: Any) -> EgressRule:
    return EgressRule(access="deny", host=host, **members)


def allowed(*rules: EgressRule, host: str = "x.org", port: int = 443, method: str = "GET", path: str = "/") -> bool:
    return Policy(rules).judge_request(host, port, method, path).allowed


def test_no_rule_allows_nothing() -> None:
    policy = Policy(())
    assert not policy.judge_request("x.org", 80, "GET", "/").allowed
    assert not policy.judge_handshake("x.org", 443).allowed
    assert not policy.judge_opaque("x.org", 22).allowed


def test_the_first_match_decides() -> None:
    assert not allowed(deny("x.org"), allow("*"))
    assert allowed(allow("*"), deny("x.org"))
    assert allowed(deny("y.org"), allow("*"))
    assert not allowed(deny("*.org"), allow("x.org"))


@pytest.mark.parametrize(
    ("pattern", "host", "matches"),
    [
        ("x.org", "x.org", True),
        ("X.Org", "x.org", True),
        (" x.org ", "x.org", True),
        ("x.org.", "x.org", True),
        ("*.x.org", "a.x.org", True),
        ("*.x.org", "a.b.x.org", True),
        ("*.x.org", "x.org", False),
        ("*.x.org", "ax.org", False),
        ("*x.org", "ax.org", True),
        ("api.*.org", "api.a.b.org", True),
        ("api.*.org", "api.org", False),
        ("*", "1.2.3.4", True),
        ("**", "x.org", True),
        ("1.2.3.*", "1.2.3.4", True),
        ("0x7f.1", "127.0.0.1", True),
        ("[::1]", "::1", True),
        ("a*a", "a", False),
    ],
)
def test_host_patterns(pattern: str, host: str, matches: bool) -> None:
    assert allowed(allow(pattern), host=host) is matches


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("/repos/**", "/repos", True),
        ("/repos/**", "/repos/", True),
        ("/repos/**", "/repos/a/b", True),
        ("/repos/**", "/reposx", False),
        ("/users/*", "/users/42", True),
        ("/users/*", "/users/", True),
        ("/users/*", "/users", False),
        ("/users/*", "/users/4/x", False),
        ("/a*z/b", "/a123z/b", True),
        ("/**/end", "/end", True),
        ("/**/end", "/a/b/end", True),
        ("/**/end", "/a/b/ending", False),
        ("/a/**/b/**/c", "/a/x/b/y/z/c", True),
        ("/a/**/b/**/c", "/a/b/c", True),
        ("/a/**/b/**/c", "/a/c", False),
        ("**", "/anything/at/all", True),
        ("*", "/one", True),
        ("/[ab]", "/a", False),
        ("/a?", "/ab", False),
        ("/caf\u00e9", "/caf%C3%A9", True),
        ("/", "/", True),
        ("/", "/a", False),
    ],
)
def test_path_patterns(pattern: str, path: str, matches: bool) -> None:
    assert allowed(allow("x.org", paths=(pattern,)), path=path) is matches


@pytest.mark.parametrize(
    "path",
    ["/public/../admin", "/public/%2e%2e/admin", "/public/..%2fadmin", "/public/%252e%252e/admin", "/public/..;/admin",
     "/public/..\\admin", "/public/%5c../admin", "/public//../admin", "/public/.%2e;x/admin", "/admin",
     "/public/x/../../admin"],
)  # fmt: skip
def test_no_spelling_leads_out_of_an_allowed_path(path: str) -> None:
    assert not allowed(allow("x.org", paths=("/public/**",)), path=path)
    assert not allowed(deny("x.org", paths=("/admin/**",)), allow("x.org"), path=path)


@pytest.mark.parametrize(
    "path", ["//admin", "/./admin", "/%61dmin", "/%2561dmin", "/x/../admin", "/admin;a=b", "/\\admin"]
)
def test_no_spelling_hides_a_denied_path(path: str) -> None:
    assert not allowed(deny("x.org", paths=("/admin",)), allow("x.org"), path=path)


def test_a_secret_is_not_injected_where_readings_differ() -> None:
    keyed = allow("x.org", paths=("/api/**",), override=EgressOverride(headers={"Authorization": "secret"}))
    policy = Policy((keyed, allow("x.org")))
    assert policy.judge_request("x.org", 443, "GET", "/api/v1").rule is policy.rules[0]
    assert not policy.judge_request("x.org", 443, "GET", "/api/../v1").allowed


def test_ports_and_methods() -> None:
    rule = allow("x.org", ports=(443, 8443), methods=("get", "HEAD"))
    assert allowed(rule, port=8443)
    assert not allowed(rule, port=80)
    assert not allowed(rule, method="POST")
    assert allowed(allow("x.org", methods=(), ports=(), paths=()), method="BREW", port=1)
    assert not allowed(deny("x.org", methods=("POST",)), allow("*"), method="POST")


def test_at_the_handshake() -> None:
    assert Policy((allow("x.org", methods=("GET",), paths=("/a",)),)).judge_handshake("x.org", 443).allowed
    assert Policy((deny("x.org", paths=("/a",)), allow("*"))).judge_handshake("x.org", 443).allowed
    assert not Policy((deny("x.org", methods=("GET",)), allow("*"))).judge_handshake("x.org", 443).allowed
    assert not Policy((allow("x.org", ports=(8443,)),)).judge_handshake("x.org", 443).allowed


@pytest.mark.parametrize(
    "first",
    [
        deny("x.org", paths=("/a",)),
        deny("x.org", methods=("GET",)),
        allow("x.org", paths=("/a",)),
        allow("x.org", methods=("GET",)),
        allow("x.org", override_script="body = nil"),
        allow("x.org", override=EgressOverride(headers={"a": "b"})),
        deny("x.org"),
    ],
)
def test_bytes_that_are_no_requests_need_a_plain_allow(first: EgressRule) -> None:
    assert not Policy((first, allow("*"))).judge_opaque("x.org", 22).allowed
    assert Policy((first, allow("*"))).judge_opaque("y.org", 22).allowed


def test_an_upstream_of_its_own_is_no_hindrance_to_opaque_bytes() -> None:
    assert Policy((allow("x.org", override=EgressOverride(host="db:5432")),)).judge_opaque("x.org", 5432).allowed


@pytest.mark.parametrize("name", ["left-pad", "@scope/pkg"])
def test_npm_helper_reaches_tarballs_of_its_package_only(name: str) -> None:
    file = name.rsplit("/", 1)[-1]
    rule = allow("registry.test", paths=(f"/{name}", f"/{name}/*"))
    for path in (f"/{name}", f"/{name}/1.0.0", f"/{name}/-/{file}-1.0.0.tgz", "/" + name.replace("/", "%2f")):
        assert allowed(rule, host="registry.test", path=path), path
    for path in (f"/{name}/a/b", f"/{name}/-/a/b.tgz", f"/{name}/-/x.txt", "/other/-/other-1.0.0.tgz", f"/{name}x"):
        assert not allowed(rule, host="registry.test", path=path), path
    assert not allowed(allow("x.org", paths=(f"/{name}/*",)), path=f"/{name}/-/{file}-1.0.0.tgz")


def test_many_names_are_not_all_remembered() -> None:
    policy = Policy((allow("*.x.org"),))
    for number in range(MAX_REMEMBERED_TARGETS + 10):
        assert policy.judge_handshake(f"n{number}.x.org", 443).allowed
    assert len(policy._targets) == MAX_REMEMBERED_TARGETS


# -- against a plain reading of the same words ----------------------------------------------------------------------

_hosts = st.sampled_from(["a", "b", "ab", "a.b", "b.a.b", "aa.b"])
_host_patterns = st.from_regex(r"[ab*]([ab.*]{0,4}[ab*])?", fullmatch=True)
_segments = st.text("ab", max_size=3)
_paths = st.lists(_segments, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))
_path_patterns = st.lists(st.one_of(st.text("ab*", max_size=3), st.just("**")), min_size=1, max_size=4).map(
    lambda parts: "/" + "/".join(parts)
)
_methods = st.sampled_from(["GET", "POST", "PUT"])
_rules = st.builds(
    EgressRule,
    access=st.sampled_from(["allow", "deny"]),
    host=_host_patterns,
    ports=st.none() | st.lists(st.integers(1, 3), max_size=2).map(tuple),
    methods=st.none() | st.lists(_methods, max_size=2).map(tuple),
    paths=st.none() | st.lists(_path_patterns, max_size=3).map(tuple),
)


def _plain_glob(pattern: str, text: str) -> bool:
    return re.fullmatch("[^\0]*".join(map(re.escape, pattern.split("*"))), text) is not None


def _plain_segments(pattern: list[str], segments: list[str]) -> bool:
    if not pattern:
        return not segments
    if pattern[0] == "**":
        return _plain_segments(pattern[1:], segments) or (bool(segments) and _plain_segments(pattern, segments[1:]))
    return bool(segments) and _plain_glob(pattern[0], segments[0]) and _plain_segments(pattern[1:], segments[1:])


@given(st.text("ab*", max_size=8), st.text("ab", max_size=12))
@example("*a*b", "aab")
def test_globs_match_as_the_regular_expression(pattern: str, text: str) -> None:
    assert matches_glob(pattern, text) is _plain_glob(pattern, text)


@given(
    st.lists(st.sampled_from(["a", "b", "*", "a*", "**"]), max_size=6),
    st.lists(st.sampled_from(["a", "b", "ab", ""]), max_size=7),
)
def test_segments_match_as_the_recursive_reading(pattern: list[str], segments: list[str]) -> None:
    assert matches_segments(pattern, segments) is _plain_segments(pattern, segments)


def _plain_verdict(rules: list[EgressRule], host: str, port: int, method: str, path: str) -> int | None:
    for index, rule in enumerate(rules):
        patterns = [pattern[1:].split("/") for pattern in (*(rule.paths or ()), *_tarballs(rule))]
        if (
            _plain_glob(rule.host, host)
            and (not rule.ports or port in rule.ports)
            and (not rule.methods or method in rule.methods)
            and (not rule.paths or any(_plain_segments(pattern, path[1:].split("/")) for pattern in patterns))
        ):
            return index
    return None


def _tarballs(rule: EgressRule) -> list[str]:
    return [f"{path}/-/*.tgz" for path in rule.paths or () if "*" not in path and f"{path}/*" in (rule.paths or ())]


@given(st.lists(_rules, max_size=6), _hosts, st.integers(1, 3), _methods, _paths)
def test_the_compiled_list_decides_as_the_plain_one(
    rules: list[EgressRule], host: str, port: int, method: str, path: str
) -> None:
    policy = Policy(rules)
    if len(path_readings(path)) > 1:
        return
    rule = policy.judge_request(host, port, method, path).rule
    assert (None if rule is None else rule.index) == _plain_verdict(rules, host, port, method, path)


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=10))
def test_any_request_gets_a_verdict(host: str, path: str, method: str) -> None:
    policy = Policy((deny("*", paths=("/a/**",)), allow("*", paths=("/**",))))
    policy.judge_request(host, 443, method, path)
    assert path_readings(path)
